"""Merging into a copy, in float64 and through a save and reload."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.lora.test_attach import logits, randomise
from tests.support.shapes import EXPERT_SHAPES, SHAPES, tiny_model, token_ids
from tests.support.wrappers import compiled, compiled_layers
from tunery.errors import AdapterError
from tunery.fast.adapters import apply_lora, merge
from tunery.fast.packed_model import optimize_model
from tunery.lora.attach import disabled, lora_layers, remove, set_active

F64 = torch.float64


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def adapted(shape: str, dtype: torch.dtype = F64, tied: bool | None = None, more: tuple[str, ...] = ()) -> Any:
    model = apply_lora(tiny_model(shape, dtype, tied), rank=3, targets=["all-linear", *more])
    randomise(model)
    return model


@pytest.mark.parametrize("shape", [*SHAPES, *EXPERT_SHAPES])
def test_the_copy_answers_as_the_adapter_and_the_model_is_unchanged(shape: str) -> None:
    model = adapted(shape)
    before, tuned = copy.deepcopy(model.state_dict()), logits(model)
    merged = merge(model)
    assert relative(logits(merged), tuned) < 1e-10
    assert {type(m) for m in merged.modules()} == {type(m) for m in tiny_model(shape).modules()}
    assert set(merged.state_dict()) == set(tiny_model(shape).state_dict())
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    storages = {p.data_ptr() for p in model.parameters()}
    assert not storages & {p.data_ptr() for p in merged.parameters()}
    with disabled(model):
        assert torch.equal(logits(model), logits(tiny_model(shape, F64)))
    remove(model, "default")
    assert torch.equal(logits(model), logits(tiny_model(shape, F64)))


@pytest.mark.parametrize("wrap", [compiled, compiled_layers, nn.DataParallel])
def test_the_copy_of_a_wrapped_model_is_a_plain_one(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = wrap(adapted("llama", torch.float32))
    merged = merge(model)
    assert {type(m) for m in merged.modules()} == {type(m) for m in tiny_model("llama").modules()}
    merged.save_pretrained(tmp_path)  # type: ignore[operator]
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", [(), ("lm_head",), ("embedding",), ("embedding", "lm_head")])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma3"])
def test_tied_weights_come_apart_only_when_one_is_adapted(
    shape: str, more: tuple[str, ...], tied: bool, tmp_path: Path
) -> None:
    embedding = "wte" if shape == "gpt2" else "embed_tokens"
    model = adapted(shape, torch.float32, tied, tuple(embedding if name == "embedding" else name for name in more))
    merged = merge(model)
    still_tied = tied and not more
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) is still_tied
    assert merged.config.tie_word_embeddings is still_tied
    assert model.config.tie_word_embeddings is tied
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    assert relative(logits(merged), logits(model)) < 1e-4
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_the_sum_is_rounded_once() -> None:
    model = adapted("llama", torch.bfloat16)
    layer = lora_layers(model)["model.layers.1.mlp.up_proj"]
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    expected = (layer.weight.float() + layer.scaling["default"] * (B @ A)).bfloat16()
    merged = merge(model)
    assert torch.equal(merged.get_submodule("model.layers.1.mlp.up_proj").weight, expected)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in merged.parameters())


def test_one_of_two_adapters() -> None:
    model = adapted("llama")
    apply_lora(model, rank=2, targets=["mlp", "embed_tokens"], name="second")
    randomise(model, "second", seed=9)
    for name in ("default", "second"):
        merged = merge(model, name)
        set_active(model, name)
        assert relative(logits(merged), logits(model)) < 1e-10
        assert relative(logits(merge(model)), logits(model)) < 1e-10


def test_a_layer_with_two_places_stays_shared() -> None:
    model = tiny_model("llama", F64, tied=True)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    apply_lora(model, rank=2)
    randomise(model)
    merged = merge(model)
    assert merged.model.layers[1].mlp is merged.model.layers[0].mlp
    assert merged.config.tie_word_embeddings
    assert relative(logits(merged), logits(model)) < 1e-10


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(AdapterError, match="no active adapter"):
        merge(tiny_model("llama"))
    model = adapted("llama")
    with pytest.raises(AdapterError, match="'other'"):
        merge(model, "other")
    set_active(model, None)
    with pytest.raises(AdapterError, match="no active adapter"):
        merge(model)


def test_a_quantised_weight_is_refused() -> None:
    model = adapted("llama")
    base = model.get_submodule("model.layers.0.self_attn.q_proj.base")
    base.weight = nn.Parameter(torch.zeros(16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj is quantised"):
        merge(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_model_that_has_run_here_merges_into_one_with_transformers_own_modules(name: str) -> None:
    model = tiny_model(name).eval()
    classes = [type(module) for module in model.modules()]
    apply_lora(model, rank=2)
    optimize_model(model)
    assert model(input_ids=token_ids()).logits.shape == (2, 12, 96)
    merged = merge(model)
    assert [type(module) for module in merged.modules()] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
    assert any(module._forward_hooks for module in model.modules()), "the model itself is not touched"
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits, atol=1e-5)
