"""A model that stores 16 bits and computes in float32 gives what its widened copy gives."""

from __future__ import annotations

import pytest
import torch

from tests.lora.test_attach import randomise
from tests.support.shapes import SHAPES, tiny_model, token_ids
from tunery.export import token_scores
from tunery.fast.adapters import apply_lora


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_as_if_it_were_widened(shape: str, dtype: torch.dtype) -> None:
    model = tiny_model(shape, torch.float32)
    narrow = tiny_model(shape, dtype)
    for mine, stored in zip(model.parameters(), narrow.parameters(), strict=True):
        mine.copy_(stored)
    for mine, stored in zip(model.buffers(), narrow.buffers(), strict=True):  # rotary frequencies are loaded in float32
        if mine.ndim:
            stored.data = mine.data.clone()
    stored = {name: p.clone() for name, p in narrow.named_parameters()}
    targets = ["all-linear", "wte" if shape == "gpt2" else "embed_in" if shape == "gpt_neox" else "embed_tokens"]
    for each in (model, narrow):
        apply_lora(each, rank=2, targets=targets)
        randomise(each)
    given = narrow(input_ids=token_ids(), use_cache=False).logits
    with token_scores.compute_in_float32(narrow):
        found = narrow(input_ids=token_ids(), use_cache=False).logits
        wide = {p.data_ptr(): p for p in narrow.parameters()}
    assert found.dtype == torch.float32
    assert torch.allclose(found, model(input_ids=token_ids(), use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert sum(p.dtype == dtype for p in wide.values()) == len(stored)  # nothing stays wide
    assert torch.equal(narrow(input_ids=token_ids(), use_cache=False).logits, given)  # all is as it was


def test_a_wide_layer_is_taken_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(16, 40).to(torch.bfloat16)
    model = torch.nn.Sequential(layer)
    x = torch.randn(3, 16)
    expected = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
    monkeypatch.setattr(token_scores, "PART", 100)  # six rows at a time
    with token_scores.compute_in_float32(model):
        assert torch.allclose(model(x), expected, atol=1e-6)
    assert model[0] is layer


def test_a_float32_model_is_left_alone() -> None:
    model = tiny_model("llama")
    before = [type(module) for module in model.modules()]
    with token_scores.compute_in_float32(model):
        assert [type(module) for module in model.modules()] == before
