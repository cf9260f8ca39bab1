"""The fused functions against the same sums written out, in float64."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.double import Double
from tests.support.shapes import tiny_model
from tunery.data.batching import Row, pack
from tunery.fast import fused_lora as fused
from tunery.fast import shared_input as shared
from tunery.fast.adapters import apply_lora
from tunery.fast.fused_linear import FusedLoRALinear
from tunery.fast.fused_lora import LoRAPart, gated_mlp, lora_linears
from tunery.fast.fused_mlp import FusedMLP, replace_mlps
from tunery.fast.islands import ACTIVATIONS
from tunery.fast.packed_model import optimize_model
from tunery.lora.attach import lora_layers

F64 = torch.float64


def random_part(inside: int, outside: int, rank: int, bias: bool, seed: int) -> LoRAPart:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=random)

    A, B = draw(rank, inside).requires_grad_(), draw(outside, rank).requires_grad_()
    return LoRAPart(draw(outside, inside), draw(outside) if bias else None, A, B, 0.5 + seed)


def written_out(x: Tensor, part: LoRAPart) -> Tensor:
    return F.linear(x, part.dense(), part.bias) + part.scaling * (x @ part.A.t()) @ part.B.t()


def same(got: Any, wanted: Any) -> bool:
    return all(float((a - b).norm()) <= 1e-12 * float(b.norm()) for a, b in zip(got, wanted, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.booleans()), min_size=1, max_size=4),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    used=st.integers(1, 15),
)
def test_layers_with_one_input_are_the_formula_and_its_gradient(
    layers: list[tuple[int, int, bool]], shape: list[int], used: int
) -> None:
    """Any widths and ranks, with and without bias; `used` says (in bits) from which outputs something is computed."""
    parts = [random_part(7, out, rank, bias, seed) for seed, (out, rank, bias) in enumerate(layers)]
    x = torch.randn(*shape, 7, dtype=F64, requires_grad=True)
    which = [i for i in range(len(parts)) if used >> i & 1] or [0]
    inputs = [x, *(t for i in which for t in (parts[i].A, parts[i].B))]

    def gradients(outputs: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(torch.stack([(outputs[i] * outputs[i].cos()).sum() for i in which]).sum(), inputs)

    got, wanted = lora_linears(x, parts), [written_out(x, part) for part in parts]
    assert same(got, wanted)
    assert same(gradients(got), gradients(wanted))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gated_block_is_the_formula_and_its_gradient(activation: str) -> None:
    act, _ = ACTIVATIONS[activation]
    gate, up, down = random_part(6, 10, 2, False, 0), random_part(6, 10, 3, True, 1), random_part(10, 6, 4, True, 2)
    # small, so that the cosine below is not of thousands, whose rounding would show
    x = (0.1 * torch.randn(2, 5, 6, dtype=F64, generator=torch.Generator().manual_seed(3))).requires_grad_()
    inputs = [x, *(t for part in (gate, up, down) for t in (part.A, part.B))]
    got = gated_mlp(x, gate, up, down, activation)
    wanted = written_out(act(written_out(x, gate)) * written_out(x, up), down)
    assert same([got], [wanted])
    assert same(torch.autograd.grad(got.cos().sum(), inputs), torch.autograd.grad(wanted.cos().sum(), inputs))


@pytest.mark.parametrize("aligned", [False, True])
def test_in_a_step_gradients_add_up_as_autograd_would_add_them(aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of other ranks and scalings with one input and the block after them, for three micro-batches."""
    monkeypatch.setattr(fused, "_wants_alignment", lambda device: aligned)
    parts = [random_part(7, out, rank, False, seed) for seed, (out, rank) in enumerate([(6, 4), (3, 8), (3, 5)])]
    block = random_part(6, 9, 3, True, 4), random_part(6, 9, 3, False, 4), random_part(9, 6, 2, False, 5)
    adapters = [t for part in (*parts, *block) for t in (part.A, part.B)]
    batches = [0.1 * torch.randn(n, 7, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in (5, 1, 8)]

    def loss(x: Tensor) -> Tensor:
        first, second, third = lora_linears(x, parts)
        return gated_mlp(first, *block, "silu").cos().sum() + (second * third).sum()

    wanted = [torch.zeros_like(t) for t in adapters]
    for x in batches:
        for total, gradient in zip(wanted, torch.autograd.grad(loss(x), adapters), strict=True):
            total += gradient
    adapters[0].grad = torch.ones_like(adapters[0])  # of somebody else
    wanted[0] += 1
    with fused.one_step():
        for x in batches:
            loss(x).backward()
        assert adapters[1].grad is None
    assert same([t.grad for t in adapters], wanted)
    assert all(t.grad.is_contiguous() for t in adapters if t.grad is not None)


def test_a_step_that_fails_leaves_no_gradient() -> None:
    part = random_part(6, 4, 2, False, 0)

    def fail() -> None:
        with fused.one_step():
            lora_linears(torch.randn(3, 6, dtype=F64), [part])[0].sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert part.A.grad is None
    lora_linears(torch.randn(3, 6, dtype=F64), [part])[0].sum().backward()
    assert part.A.grad is not None, "outside a step autograd gets the gradient"


def test_in_a_step_an_adapters_copy_in_the_models_dtype_is_made_once() -> None:
    part = random_part(6, 4, 2, False, 0)
    with fused.one_step():
        for _ in range(3):
            lora_linears(torch.randn(3, 6, dtype=torch.float32), [replace(part, weight=torch.zeros(4, 6))])
        assert fused._step is not None
        assert len(fused._step) == 1


def test_no_gradient_goes_where_none_is_wanted() -> None:
    """Below the lowest adapted layer the input needs none; an adapter that is not trained gets none."""
    part = random_part(6, 4, 2, False, 0)
    frozen = LoRAPart(part.weight, None, part.A.detach(), part.B.detach(), 1.0)
    x = torch.randn(3, 6, dtype=F64)
    lora_linears(x, [part])[0].sum().backward()
    assert part.A.grad is not None
    assert x.grad is None
    x.requires_grad_()
    (got,) = torch.autograd.grad(lora_linears(x, [frozen])[0].sum(), [x])
    (wanted,) = torch.autograd.grad(written_out(x, frozen).sum(), [x])
    assert same([got], [wanted])


def adapted(dropout: float = 0.0) -> tuple[nn.Module, FusedLoRALinear]:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    apply_lora(model, rank=2, targets=["0"], dropout=dropout)
    layer = model[0]
    assert isinstance(layer, FusedLoRALinear)
    return model, layer


def test_what_the_fused_function_does_not_know_takes_the_plain_path() -> None:
    x = torch.randn(3, 4)
    model, layer = adapted()
    assert layer.part(x) is not None
    assert layer.part(x.double()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.part(x) is None
    layer.weight.requires_grad_(True)
    assert layer.part(x) is None
    layer.weight.requires_grad_(False)
    calls = []
    hook = layer.base.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls, "a hook that somebody put on the base layer is run"
    hook.remove()
    dropping, layer = adapted(dropout=0.5)
    assert layer.part(x) is not None
    dropping.train()
    assert layer.part(x) is None


def row(length: int) -> Row:
    ids = torch.arange(3, 3 + length).numpy().astype("int32")
    return Row(ids, (ids > 8).astype("float32"))


def query_layer(model: nn.Module) -> FusedLoRALinear:
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    assert isinstance(layer, FusedLoRALinear)
    return layer


def test_query_key_and_value_compute_together_in_a_run_and_alone_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").eval()
    apply_lora(model, rank=2)
    flat = optimize_model(model)
    together = query_layer(model).shared
    assert together is not None
    assert [layer.out_features for layer in together.layers if isinstance(layer, FusedLoRALinear)] == [32, 16, 16]
    counts: list[int] = []
    real = shared.lora_linears
    monkeypatch.setattr(shared, "lora_linears", lambda x, parts: (counts.append(len(parts)), real(x, parts))[1])
    with torch.no_grad():
        flat.hidden(pack([row(20)]))
        assert counts == [3, 3]
        model(input_ids=torch.arange(3, 9)[None], use_cache=False)
        assert counts == [3, 3]


def test_outputs_that_nobody_takes_are_not_kept() -> None:
    model = tiny_model("llama").eval()
    apply_lora(model, rank=2)
    optimize_model(model)
    query = query_layer(model)
    assert query.shared is not None
    x = torch.randn(1, 3, 32)
    with shared.sharing():
        query(x)
        (ready,) = query.shared._outputs._ready.values()
        assert len(ready.outputs) == 2
    assert not query.shared._outputs._ready


def test_a_backward_pass_in_another_thread_leaves_nothing_behind() -> None:
    """CUDA's backward pass recomputes layers in a thread of autograd's own."""
    model = tiny_model("llama").eval()
    apply_lora(model, rank=2)
    optimize_model(model)
    layers = {name: layer for name, layer in lora_layers(model).items() if isinstance(layer, FusedLoRALinear)}
    groups = {layer.shared for layer in layers.values() if layer.shared is not None}
    alive: list[weakref.ref[Tensor]] = []

    def recompute() -> None:
        for block in range(2):
            x = torch.randn(1, 3, 32)
            alive.append(weakref.ref(x))
            for which in "qkv":
                layers[f"model.layers.{block}.self_attn.{which}_proj"](x)
        x = torch.randn(1, 3, 32)
        alive.append(weakref.ref(x))
        layers["model.layers.0.self_attn.q_proj"](x)  # and is stopped before k_proj

    with shared.sharing():
        thread = threading.Thread(target=recompute)
        thread.start()
        thread.join()
        assert [reference() is None for reference in alive] == [True, True, False]
        assert sum(len(group._outputs._ready) for group in groups) == 1
    assert alive[-1]() is None
    assert not any(group._outputs._ready for group in groups)


def test_an_adapter_on_some_of_the_layers_only_runs_them_one_by_one() -> None:
    with Double():
        plain, model = (tiny_model("llama", dtype=F64).eval() for _ in range(2))
        for each in (plain, model):
            apply_lora(each, rank=2, targets=["q_proj", "gate_proj"])
        optimize_model(model)
        ids = torch.arange(3, 20)[None]
        with shared.sharing(), torch.no_grad():
            got, wanted = (each(input_ids=ids, use_cache=False).logits for each in (model, plain))
    assert float((got - wanted).norm()) < 1e-12 * float(wanted.norm())


def test_a_block_that_does_something_else_is_left_alone() -> None:
    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    model = nn.Sequential(Unlike())
    assert replace_mlps(model) == 0
    assert not any(isinstance(module, FusedMLP) for module in model.modules())


def test_the_model_keeps_its_names_for_layers_and_weights() -> None:
    """Adapters, checkpoints and merging find their way by these names."""
    before = tiny_model("gemma2")
    model = tiny_model("gemma2").eval().requires_grad_(False)
    optimize_model(model)
    assert list(model.state_dict()) == list(before.state_dict())
    assert any(isinstance(module, FusedMLP) for module in model.modules())
