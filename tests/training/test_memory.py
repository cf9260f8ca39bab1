"""The memory formula against what autograd really keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tunery.data.batching import Row, pack
from tunery.fast.adapters import apply_lora
from tunery.fast.packed_model import optimize_model
from tunery.training.memory import Lean, estimate, tokens_that_fit

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=192, n_layer=3, n_head=6, n_positions=256)
LEANNESS = {id(LLAMA): Lean(), id(GPT2): Lean(norms=True, mlp=False)}
SIZES: dict[str, Any] = {
    "parameters": 1_000_000,
    "trainable": 10_000,
    "dtype_bytes": 2,
    "gradient_checkpointing": False,
}


def kept_bytes(config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the storages that the decoder layers save for their backward pass."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    apply_lora(model, rank=2)
    flat = optimize_model(model)
    row = Row(np.arange(tokens + 1, dtype=np.int32) % 60, np.r_[0, np.ones(tokens)].astype(np.float32))
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = flat.hidden(pack([row]))
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_the_estimate_covers_what_autograd_keeps_and_is_not_far_above(config: Any, dtype: torch.dtype) -> None:
    tokens = 128
    kept = kept_bytes(config, dtype, tokens)
    sizes = {**SIZES, "dtype_bytes": dtype.itemsize}
    expected = estimate(
        config, tokens_in_flight=tokens, trained_tokens=1, keys=tokens, lean=LEANNESS[id(config)], **sizes
    )
    assert kept <= expected.activations <= 1.5 * kept


def test_the_parts() -> None:
    parts = estimate(LLAMA, tokens_in_flight=100, trained_tokens=10, **SIZES)
    assert parts.base == 2_000_000
    assert parts.adapter_and_optimizer == 180_000  # weight, gradient, two moments in float32, one copy in bfloat16
    assert parts.total == parts.base + parts.adapter_and_optimizer + parts.activations + parts.logits


def test_a_large_vocabulary_costs_no_more_than_a_few_chunks() -> None:
    wide = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": 150_000})
    few, many = (estimate(wide, tokens_in_flight=n, trained_tokens=n, **SIZES).logits for n in (4096, 65_536))
    assert few == many < 400 * 2**20


def test_recomputing_keeps_one_layer_and_the_inputs_of_the_others() -> None:
    sizes: dict[str, Any] = {**SIZES, "tokens_in_flight": 1000, "trained_tokens": 1000}
    kept = estimate(LLAMA, **sizes).activations
    sizes["gradient_checkpointing"] = True
    recomputed = estimate(LLAMA, **sizes).activations
    assert kept / 3 < recomputed < kept / 2


def test_longer_rows_keep_more_attention_weights_up_to_where_they_are_computed_again() -> None:
    by_keys = [
        estimate(LLAMA, tokens_in_flight=4000, trained_tokens=1, keys=keys, **SIZES).activations
        for keys in (0, 100, 640, 2000)
    ]
    assert by_keys[0] == by_keys[3] < by_keys[1] < by_keys[2]


def test_a_mixture_of_experts_counts_the_experts_a_token_visits() -> None:
    def moe(visited: int) -> Any:
        return Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=visited,
            moe_intermediate_size=48,
        )

    one, four = (estimate(moe(n), tokens_in_flight=64, trained_tokens=1, **SIZES).activations for n in (1, 4))
    assert one < four < 4 * one


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_tokens_that_fit_is_the_largest_number_within_the_budget(config: Any, recompute: bool) -> None:
    sizes = {**SIZES, "gradient_checkpointing": recompute}
    budget = 40_000_000
    fits = tokens_that_fit(config, budget_bytes=budget, **sizes)
    assert fits > 10
    totals = [estimate(config, tokens_in_flight=n, trained_tokens=n, **sizes).total for n in (fits, fits + 1)]
    assert totals[0] <= budget < totals[1]
    assert tokens_that_fit(config, budget_bytes=1_000_000, **sizes) == 0


@pytest.mark.parametrize(
    ("config", "targets", "wanted"),
    [(LLAMA, "all-linear", Lean()), (LLAMA, "attention", Lean(mlp=False)), (GPT2, "all-linear", Lean(mlp=False))],
    ids=["all", "attention only", "gpt2"],
)
def test_what_a_model_will_keep_is_known_before_it_runs_and_after(config: Any, targets: str, wanted: Lean) -> None:
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    apply_lora(model, rank=2, targets=targets)
    assert Lean.of(model) == wanted
    optimize_model(model)
    assert Lean.of(model) == wanted
