"""Attention blocks and decoder layers of ours give what the model's own give, and leave alone what they do not know."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.double import Double
from tests.support.shapes import tiny_model, token_ids
from tunery.fast.fused_layer import FusedAttention, FusedDecoderLayer, replace_attention, replace_layers
from tunery.fast.fused_rmsnorm import replace_norms
from tunery.fast.packed_model import optimize_model, restore_model

COMMON = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")
UNCOMMON = ("gpt2", "phi3", "opt", "gpt_neox", "gpt_oss")


def lean(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """(the model as it is, a copy with everything replaced)."""
    model = tiny_model(name, dtype).requires_grad_(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight, mean=1.0, std=0.1)  # type: ignore[arg-type]
    ours = copy.deepcopy(model)
    replace_norms(ours)
    replace_attention(ours)
    replace_layers(ours)
    return model, ours


def gradient(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = model(inputs_embeds=x, use_cache=False).logits
    return out.detach(), torch.autograd.grad(out.cos().sum(), x)[0]


@pytest.mark.parametrize("name", COMMON)
def test_common_forms_are_replaced_and_give_the_same_gradient(name: str) -> None:
    with Double():
        model, ours = lean(name)
        kinds = [type(module) for module in ours.modules()]
        assert (kinds.count(FusedAttention), kinds.count(FusedDecoderLayer)) == (2, 2)
        x = 0.3 * torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for got, wanted in zip(gradient(ours, x), gradient(model, x), strict=True):
            assert float((got - wanted).norm()) < 1e-11 * float(wanted.norm())


@pytest.mark.parametrize("name", COMMON)
def test_generation_with_a_cache_goes_on_as_before(name: str) -> None:
    model, ours = lean(name)
    ids = token_ids(1, 5)
    got, wanted = (each.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0) for each in (ours, model))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", UNCOMMON)
def test_other_forms_are_left_alone(name: str) -> None:
    model = tiny_model(name).requires_grad_(False)
    assert replace_norms(model) >= 0
    assert replace_attention(model) == 0
    assert replace_layers(model) == 0


def test_what_computes_something_else_under_the_same_names_is_left_alone() -> None:
    model = tiny_model("llama").requires_grad_(False)
    replace_norms(model)
    layers: Any = model.model.layers

    class Turned(type(layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
            cos, sin = position_embeddings
            return super().forward(hidden_states, (cos, -sin), **kwargs)

    class Weighed(type(layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return 0.5 * super().forward(hidden_states, **kwargs)

    layers[0].self_attn.__class__ = Turned
    layers[1].__class__ = Weighed
    implementation = model.config._attn_implementation
    assert replace_attention(model) == 1
    assert replace_layers(model) == 1
    assert [isinstance(layer.self_attn, FusedAttention) for layer in layers] == [False, True]
    assert [isinstance(layer, FusedDecoderLayer) for layer in layers] == [True, False]
    assert model.config._attn_implementation == implementation


def test_somebodys_hook_keeps_a_block_as_it_is() -> None:
    model = tiny_model("llama").requires_grad_(False)
    replace_norms(model)
    layers: Any = model.model.layers
    layers[0].self_attn.register_forward_hook(lambda *_: None)
    layers[1].register_forward_hook(lambda *_: None)
    assert (replace_attention(model), replace_layers(model)) == (1, 1)


def test_everything_is_put_back_and_a_copy_is_a_model_of_its_own() -> None:
    model = tiny_model("gemma2").requires_grad_(False)
    before = [(name, type(module)) for name, module in model.named_modules()]
    optimize_model(model)
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    for each in (model, twin):
        restore_model(each)
        assert [(name, type(module)) for name, module in each.named_modules()] == before
    ids = token_ids()
    wanted = model(ids).logits
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(ids).logits, wanted)
