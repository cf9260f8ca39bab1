"""The operations that a step is measured against, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.shapes import tiny_model
from tunery.data.batching import Row, pack
from tunery.fast.adapters import apply_lora
from tunery.fast.packed_model import optimize_model
from tunery.models.windows import layer_windows
from tunery.training.flops import step_flops

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    tie_word_embeddings=False,
)
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16


def test_a_step_is_twice_its_forward_pass_and_six_for_each_trained_number() -> None:
    model = LlamaForCausalLM(CONFIG).requires_grad_(False)
    products = 4 * (100 * 3 * LAYER + 7 * 50 * 8)
    assert step_flops(model, 100, 7, 0) == products
    assert step_flops(model, 100, 7, 11) == products + 6 * 100 * 11
    assert step_flops(model, 100, 7, 11, passes=1) == products * 1.5 + 6 * 100 * 11
    assert step_flops(model, 100, 7, 0, pairs=1000) == products + 12 * 1000 * 8
    saved = 4 * (100 - 7) * (8 * 8 + 3 * 8 * 16)
    assert step_flops(model, 100, 7, 0, last_layer=8 * 8 + 3 * 8 * 16) == products - saved


def test_adapters_are_not_counted_as_the_base_and_a_reference_adapter_in_its_passes() -> None:
    model = LlamaForCausalLM(CONFIG).requires_grad_(False).eval()
    plain = step_flops(model, 100, 7, 11, passes=1)
    for name in ("default", "reference"):
        apply_lora(model, rank=2, targets=["q_proj", "lm_head", "down_proj"], name=name)
    model.requires_grad_(False)
    assert step_flops(model, 100, 7, 11, passes=1) == plain
    assert step_flops(model, 100, 7, 11, passes=1, reference_parameters=13) == plain + 2 * 100 * 13
    assert optimize_model(model).last_layer_parameters == 8 * 8 + 3 * 8 * 16


def test_what_the_last_layer_leaves_out_is_its_feed_forward_part_and_its_output_projection() -> None:
    model = LlamaForCausalLM(CONFIG).requires_grad_(False).eval()
    assert optimize_model(model).last_layer_parameters == 8 * 8 + 3 * 8 * 16


@pytest.mark.parametrize(
    ("name", "windows"),
    [("llama", [None, None]), ("mistral", [8, 8]), ("gemma2", [8, None]), ("gpt2", [None, None])],
)
def test_pairs_are_counted_within_each_layers_window(name: str, windows: list[int | None]) -> None:
    model = tiny_model(name).eval()
    assert layer_windows(model.config) == windows
    ids = np.arange(21, dtype=np.int32)
    batch = pack([Row(ids, np.r_[0, np.ones(20)].astype(np.float32))])
    each = {None: 20 * 21 // 2, 8: 8 * 9 // 2 + 12 * 8}
    assert optimize_model(model).visible_pairs(batch) == sum(each[window] for window in windows)
