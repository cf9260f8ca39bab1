"""DoRA: the formula of the paper, PEFT's files both ways, merging, and a clear no where it cannot stand by itself."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.lora.test_adapter import in_peft, made_by_peft, relative
from tests.lora.test_attach import logits, randomise
from tests.support.double import Double
from tests.support.shapes import tiny_model
from tests.training.test_gradients import make_rows
from tunery.errors import AdapterError, TargetError
from tunery.fast.adapters import apply_lora, load_adapter, merge
from tunery.fast.packed_model import optimize_model
from tunery.lora.adapter import WEIGHTS_FILE, save_adapter
from tunery.lora.attach import adapter_state, lora_layers
from tunery.lora.dropout import Dropout, DropoutClock
from tunery.lora.layer import LoRASettings, LoRATensors, wrap
from tunery.lora.variants import VARIANTS
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import train_step

F64 = torch.float64
SHAPES = ("llama", "gpt2", "gemma2")
MAGNITUDE = "lora_magnitude_vector"


def with_dora(shape: str, seed: int = 1) -> PreTrainedModel:
    model = tiny_model(shape, F64)
    return apply_lora(model, rank=3, alpha=5.0, variant="dora", seed=seed)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_formula_of_the_paper_and_its_gradient(bias: bool) -> None:
    base = nn.Linear(7, 5, bias=bias, dtype=F64).requires_grad_(False)
    A, B, m = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((3, 7), (5, 3), (5,)))
    layer = wrap(base)
    layer.add("default", LoRATensors(LoRASettings(3, 6.0, variant="dora"), A, B, {MAGNITUDE: m}), Dropout(0.0, None, 0))
    layer.active = "default"
    x = torch.randn(2, 4, 7, dtype=F64)
    V = base.weight + 2.0 * B @ A
    expected = x @ (m[:, None] * V / V.norm(dim=1, keepdim=True).detach()).T + (base.bias if bias else 0.0)
    assert relative(layer(x), expected) < 1e-12
    wanted = torch.autograd.grad(expected.square().sum(), (A, B, m))
    tensors = layer.tensors("default")  # A, B, m
    found = torch.autograd.grad(layer(x).square().sum(), list(tensors.values()))
    assert all(relative(a, b) < 1e-10 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("base", [nn.Linear(7, 5), Conv1D(5, 7)])
def test_a_fresh_adapter_leaves_the_base_as_it_was(base: nn.Module) -> None:
    layer = wrap(base)
    A, B = layer.initial(3, torch.Generator().manual_seed(0))
    layer.add("default", LoRATensors(LoRASettings(3, 6.0, variant="dora"), A, B), Dropout(0.0, None, 0))
    layer.active = "default"
    x = torch.randn(4, 7)
    assert torch.allclose(layer(x), base(x), atol=1e-6)
    magnitude = layer.tensors("default")[MAGNITUDE]
    assert magnitude.shape == (5,)
    assert magnitude.requires_grad


@pytest.mark.parametrize("shape", SHAPES)
def test_peft_loads_what_we_save(shape: str, tmp_path: Path) -> None:
    model = with_dora(shape)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", base_model="tiny")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_dora"] is True
    assert relative(in_peft(shape, tmp_path / "adapter"), logits(model)) < 1e-6  # PEFT keeps norms in float32
    ours = tiny_model(shape, F64)
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize("shape", SHAPES)
def test_we_load_what_peft_saves(shape: str, tmp_path: Path) -> None:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in lora_layers(apply_lora(tiny_model(shape, F64), rank=2))})
    expected = made_by_peft(shape, tmp_path, r=4, lora_alpha=6, target_modules=leaves, use_dora=True)
    ours = tiny_model(shape, F64)
    load_adapter(ours, tmp_path)
    assert relative(logits(ours), expected) < 1e-6
    assert {layer.settings["default"].variant for layer in lora_layers(ours).values()} == {"dora"}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_merged_model_answers_as_the_adapter_does(shape: str) -> None:
    with Double():
        model = with_dora(shape)
        randomise(model)
        optimize_model(model)
        merged = merge(model)
        assert not lora_layers(merged)
        assert relative(logits(merged), logits(model)) < 1e-9


def test_a_step_is_that_of_plain_layers_however_it_is_split() -> None:
    with Double():
        gradients = []
        for limit in (MicroBatchLimit(4), MicroBatchLimit(1)):
            base = with_dora("llama")
            randomise(base)
            model, state = optimize_model(base), adapter_state(base)
            train_step(model, list(state.values()), make_rows(3, 4), limit, DropoutClock(), (0, 0), None)
            gradients.append([p.grad.clone() for p in state.values() if p.grad is not None])
    assert len(gradients[0]) == 3 * len(lora_layers(base))
    assert all(relative(a, b) < 1e-9 for a, b in zip(*gradients, strict=True))


def test_an_embedding_is_refused_with_the_way_out() -> None:
    with pytest.raises(TargetError, match="DoRA adapts linear layers") as error:
        apply_lora(tiny_model("llama", F64), targets=["all-linear", "embed_tokens"], variant="dora")
    assert "lora.variant: lora" in str(error.value)


def test_a_folder_without_its_vectors_or_with_strange_ones_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = with_dora("llama")
    save_adapter(model, tmp_path / "a", base_model="tiny")
    file = tmp_path / "a" / WEIGHTS_FILE
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(MAGNITUDE))
    save_file({key: t for key, t in tensors.items() if key != name}, file)
    with pytest.raises(AdapterError, match=f"no {MAGNITUDE}"):
        load_adapter(tiny_model("llama", F64), tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(AdapterError, match="have no place in it"):
        load_adapter(tiny_model("llama", F64), tmp_path / "a")


def test_it_is_trained_by_peft_as_well(tmp_path: Path) -> None:
    """One step of gradient descent here and in PEFT gives the same adapter."""
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 12))
    ours = with_dora("llama")
    randomise(ours)
    save_adapter(ours, tmp_path / "a", base_model="tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama", F64), str(tmp_path / "a"), is_trainable=True)
    theirs.eval()
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    named = {
        key.replace(".default", "").removesuffix(".weight"): p
        for key, p in theirs.named_parameters()
        if p.grad is not None
    }
    state = adapter_state(ours)
    assert len(state) == len(named)
    for key, parameter in state.items():
        mine, other = parameter.grad, named[key.removesuffix(".weight")].grad
        assert mine is not None
        assert other is not None
        assert relative(mine, other) < 1e-4, key


def test_only_plain_lora_is_fused_and_served_side_by_side() -> None:
    assert [name for name, variant in VARIANTS.items() if variant.additive] == ["lora"]


def test_a_row_of_zeros_in_the_base_stays_zero() -> None:
    base = nn.Linear(6, 4)
    with torch.no_grad():
        base.weight[2] = 0
    layer = wrap(base)
    A, B = layer.initial(2, torch.Generator().manual_seed(0))
    layer.add("default", LoRATensors(LoRASettings(2, 4.0, variant="dora"), A, B), Dropout(0.0, None, 0))
    layer.active = "default"
    out = layer(torch.randn(3, 6))
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.adapter_parameters() if p.grad is not None)
    assert torch.isfinite(layer.merged("default", layer.weight)).all()


def test_it_keeps_more_memory_and_the_estimate_says_so() -> None:
    from tunery.training.memory import Lean

    assert Lean.of(with_dora("llama")).additive is False
    assert Lean.of(apply_lora(tiny_model("llama", F64), rank=2)).additive is True
