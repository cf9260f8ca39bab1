"""The layer against the paper's formula, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from tests.support.shapes import tiny_model
from tunery.errors import AdapterError
from tunery.lora.dropout import Dropout, DropoutClock
from tunery.lora.layer import LoRALayer, LoRALinear, LoRASettings, LoRATensors, can_wrap, wrap

F64 = torch.float64


def adapted(
    base: nn.Module, settings: LoRASettings, clock: DropoutClock | None = None, name: str = "default"
) -> LoRALayer:
    """The base with a random, active adapter."""
    layer = base if isinstance(base, LoRALayer) else wrap(base)
    random = torch.Generator().manual_seed(len(layer.settings))
    A = torch.randn(settings.rank, layer.in_features, dtype=F64, generator=random)
    B = torch.randn(layer.out_features, settings.rank, dtype=F64, generator=random)
    layer.add(name, LoRATensors(settings, A, B), Dropout(settings.dropout, clock, 0))
    layer.active = name
    return layer


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 9),
    width=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    batch=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    alpha=st.floats(0.01, 100),
    stabilized=st.booleans(),
    bias=st.booleans(),
)
def test_linear_is_the_formula_of_the_paper(
    rank: int, width: tuple[int, int], batch: list[int], alpha: float, stabilized: bool, bias: bool
) -> None:
    base = nn.Linear(*width, bias=bias, dtype=F64)
    layer = adapted(base, LoRASettings(rank, alpha, rank_stabilized=stabilized))
    x = torch.randn(*batch, width[0], dtype=F64)
    s = alpha / rank**0.5 if stabilized else alpha / rank
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    expected = x @ base.weight.T + s * (x @ A.T) @ B.T + (base.bias if bias else 0.0)
    assert layer(x).shape == expected.shape
    assert relative(layer(x), expected) < 1e-12


def test_gradients_are_those_of_the_formula() -> None:
    layer = adapted(nn.Linear(7, 5, dtype=F64).requires_grad_(False), LoRASettings(3, 6.0))
    x = torch.randn(2, 4, 7, dtype=F64, requires_grad=True)

    def output(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A.default": A, "lora_B.default": B}, x)

    assert torch.autograd.gradcheck(output, (x, layer.lora_A["default"], layer.lora_B["default"]))


def test_conv1d_and_linear_with_the_same_weight_agree() -> None:
    conv, linear = Conv1D(5, 7).to(F64), nn.Linear(7, 5, dtype=F64)
    linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    x = torch.randn(3, 2, 7, dtype=F64)
    one, other = (adapted(base, LoRASettings(2, 3.0)) for base in (conv, linear))
    assert relative(one(x), other(x)) < 1e-14
    merged = [layer.merged("default", layer.weight) for layer in (one, other)]
    assert relative(merged[0].T, merged[1]) < 1e-14


@pytest.mark.parametrize("scaled", [False, True])
def test_embedding_is_a_lookup_in_the_summed_table(scaled: bool) -> None:
    base = tiny_model("gemma3", F64).get_input_embeddings() if scaled else nn.Embedding(96, 32, dtype=F64)
    layer = adapted(base, LoRASettings(4, 8.0))
    ids = torch.tensor([[0, 5, 95], [5, 5, 1]])
    table = layer.merged("default", layer.weight)
    assert relative(table, layer.weight + 2.0 * (layer.lora_B["default"] @ layer.lora_A["default"]).T) < 1e-12
    expected = F.embedding(ids, table) * getattr(base, "embed_scale", 1.0)
    assert relative(layer(ids), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_active_adapter_the_base_answers_bit_for_bit(dtype: torch.dtype) -> None:
    base = nn.Linear(33, 17, dtype=dtype)
    x = torch.randn(5, 33, dtype=dtype)
    alone = base(x)
    layer = adapted(base, LoRASettings(4, 8.0))
    assert not torch.equal(layer(x), alone)
    layer.active = None
    assert torch.equal(layer(x), alone)


def test_a_fresh_adapter_changes_nothing_and_its_start_is_kaiming_uniform() -> None:
    layer = wrap(nn.Linear(64, 48))
    A, B = layer.initial(500, torch.Generator().manual_seed(0))
    assert not B.any()
    assert A.abs().max() <= 1 / 64**0.5
    assert A.abs().max() > 0.99 / 64**0.5
    assert abs(float(A.std()) - 1 / (3 * 64) ** 0.5) < 1e-3
    again, _ = layer.initial(500, torch.Generator().manual_seed(0))
    assert torch.equal(A, again)


def test_dtypes() -> None:
    for base_type, adapter_type in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
        layer = adapted(nn.Linear(4, 3, dtype=base_type), LoRASettings(2, 2.0))
        assert layer.lora_A["default"].dtype == layer.lora_B["default"].dtype == adapter_type
        out = layer(torch.randn(2, 4, dtype=base_type))
        assert out.dtype == base_type
        out.sum().backward()
        assert layer.lora_A["default"].grad is not None
        assert layer.lora_A["default"].grad.dtype == adapter_type


def test_autocast_as_hugging_face_trainers_use_it() -> None:
    layer = adapted(nn.Linear(8, 6), LoRASettings(2, 2.0))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(3, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.lora_B["default"].grad is not None


def test_several_adapters_one_active() -> None:
    layer = adapted(nn.Linear(6, 4, dtype=F64), LoRASettings(2, 4.0), name="first")
    adapted(layer, LoRASettings(3, 9.0), name="second")
    x = torch.randn(2, 6, dtype=F64)
    for name, s in (("first", 2.0), ("second", 3.0)):
        layer.active = name
        expected = layer.base(x) + s * x @ layer.lora_A[name].T @ layer.lora_B[name].T
        assert relative(layer(x), expected) < 1e-12
    assert layer.scaling == {"first": 2.0, "second": 3.0}


def test_seeded_dropout_is_a_function_of_the_clock() -> None:
    clock = DropoutClock(enabled=True)
    layer = adapted(nn.Linear(50, 4, dtype=F64), LoRASettings(2, 2.0, dropout=0.4), clock).eval()
    x = torch.ones(3, 50, dtype=F64)

    def at(*place: int) -> torch.Tensor:
        clock.set(*place)
        return layer(x)

    first = at(1, 2, 3)
    assert torch.equal(first, at(1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(first, at(*other))
    state = torch.random.get_rng_state()
    at(1, 2, 3)
    assert torch.equal(state, torch.random.get_rng_state())
    clock.enabled = False
    plain = at(1, 2, 3)
    assert torch.equal(plain, at(9, 9, 9))
    assert torch.equal(plain, layer.train()(x))


def test_seeded_dropout_keeps_the_mean_and_drops_its_share() -> None:
    x = torch.ones(200, 500)
    out = Dropout(0.3, DropoutClock(enabled=True), 7)(x, False)
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert float((out == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(out, Dropout(0.3, DropoutClock(enabled=True), 8)(x, False))


def test_recomputing_the_forward_pass_draws_the_same_mask() -> None:
    clock = DropoutClock(seed=5, step=1, enabled=True)
    layer = adapted(nn.Linear(20, 4, dtype=F64), LoRASettings(2, 2.0, dropout=0.5), clock)
    x = torch.randn(3, 20, dtype=F64, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        layer.zero_grad()
        out = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False) if recompute else layer(x)
        out.square().sum().backward()
        assert layer.lora_A["default"].grad is not None
        gradients.append(layer.lora_A["default"].grad.clone())
    assert torch.equal(*gradients)


def test_dropout_without_a_clock_follows_the_training_mode() -> None:
    layer = adapted(nn.Linear(50, 4), LoRASettings(2, 2.0, dropout=0.5))
    x = torch.ones(3, 50)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x))


def test_other_code_finds_what_it_looks_for() -> None:
    base = nn.Linear(6, 4)
    layer = adapted(base, LoRASettings(2, 2.0))
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (6, 4)
    shared = nn.Parameter(torch.zeros(4, 6))
    layer.weight = shared  # type: ignore[misc]  # as transformers ties weights
    assert base.weight is shared


def test_state_dict_shows_the_base_under_its_own_names_and_loads_again() -> None:
    model = nn.Sequential(adapted(nn.Linear(6, 4), LoRASettings(2, 2.0)), nn.Linear(4, 2))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(state) == {"0.weight", "0.bias", "0.lora_A.default", "0.lora_B.default", "1.weight", "1.bias"}
    other = nn.Sequential(adapted(nn.Linear(6, 4), LoRASettings(2, 2.0)), nn.Linear(4, 2))
    other.load_state_dict(state)
    x = torch.randn(3, 6)
    assert torch.equal(model(x), other(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({key: value for key, value in state.items() if key != "0.weight"})


@pytest.mark.parametrize("name", ["", "a.b", "keys", "with space"])
def test_a_name_that_no_parameter_can_have_is_refused(name: str) -> None:
    from tunery.fast.adapters import apply_lora

    with pytest.raises(AdapterError, match="cannot name an adapter"):
        apply_lora(tiny_model("llama"), rank=2, name=name)


def test_what_can_be_wrapped() -> None:
    assert can_wrap(nn.Linear(2, 2))
    assert can_wrap(Conv1D(2, 2))
    assert can_wrap(nn.Embedding(2, 2))
    assert not can_wrap(nn.LayerNorm(2))
    positions = tiny_model("opt").get_submodule("model.decoder.embed_positions")
    assert not can_wrap(positions)  # its forward takes no token ids
    assert isinstance(wrap(Conv1D(2, 2)), LoRALinear)
