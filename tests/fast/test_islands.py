"""The element-wise functions in both their forms, and what is done where a compiler fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.test_gradients import lora_model, make_rows, our_gradient, relative
from tunery.fast import compile as compiler
from tunery.fast import islands
from tunery.fast.compile import Island, calls, compiling, refusals
from tunery.fast.islands import ACTIVATIONS, add_rms_norm, gated, gated_backward, rms_norm, rms_norm_backward, rotate
from tunery.training.decoder_layers import running_layers
from tunery.training.guard import MicroBatchLimit

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(got: Any, wanted: Any) -> bool:
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True)
    return all(float((a - b).norm()) <= 1e-12 * float(b.norm()) for a, b in pairs)


NORMS = [(wide, around) for wide in (False, True) for around in (False, True)]


@pytest.mark.parametrize(("wide", "around"), NORMS)
def test_the_norm_and_its_gradient_in_both_forms_are_what_autograd_finds(wide: bool, around: bool) -> None:
    x, weight = draw(5, 7).requires_grad_(), draw(7, seed=1)
    grad, more = draw(5, 7, seed=2), draw(5, 7, seed=3) if around else None
    y, scale = rms_norm.written(x, weight, 1e-5, wide)
    (wanted,) = torch.autograd.grad((y * grad).sum() + (0 if more is None else (x * more).sum()), x)
    inputs = x.detach(), weight, 1e-5, wide
    assert close(rms_norm.eager(*inputs), (y, scale))
    assert close(add_rms_norm.eager(x.detach() - 1, torch.ones_like(x), *inputs[1:]), (x, y, scale))
    assert close(add_rms_norm.written(x.detach() - 1, torch.ones_like(x), *inputs[1:]), (x, y, scale))
    for form in (rms_norm_backward.written, rms_norm_backward.eager):
        assert close(form(grad.clone(), more, x.detach(), weight, scale.detach()), wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gated_unit_and_its_gradient_in_both_forms_are_what_autograd_finds(activation: str) -> None:
    gate, up = draw(4, 9).mul(3).requires_grad_(), draw(4, 9, seed=1).requires_grad_()
    grad = draw(4, 9, seed=2)
    y = gated.written(gate, up, activation)
    wanted = (y, *torch.autograd.grad((y * grad).sum(), (gate, up)))
    given = gate.detach(), up.detach(), activation
    assert close(gated.eager(*given), y)
    for form in (gated_backward.written, gated_backward.eager):
        assert close(form(grad.clone(), *given), wanted)


def test_the_rotation_and_its_gradient_in_both_forms_are_what_autograd_finds() -> None:
    q, k = draw(1, 5, 4, 6).requires_grad_(), draw(1, 5, 2, 6, seed=1).requires_grad_()
    cos, sin = draw(1, 5, 1, 6, seed=2), draw(1, 5, 1, 6, seed=3)  # halves that differ

    def half_turn(x: Tensor) -> Tensor:
        return torch.cat((-x[..., 3:], x[..., :3]), dim=-1)

    wanted = tuple(x * cos + half_turn(x) * sin for x in (q, k))
    grads = draw(1, 5, 4, 6, seed=4), draw(1, 5, 2, 6, seed=5)
    back = torch.autograd.grad(sum((y * g).sum() for y, g in zip(wanted, grads, strict=True)), (q, k))  # type: ignore[arg-type]
    for form in (rotate.written, rotate.eager):
        assert close(form(q.detach(), k.detach(), cos, sin, 1), wanted)
        assert close(form(*grads, cos, sin, -1), back)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_gradient_of_the_softmax_is_what_autograd_finds(softcap: float | None) -> None:
    logits, weights = draw(4, 11).requires_grad_(), draw(4, seed=1)
    sums, best = islands.softmax_sums(logits, 1.5, softcap)
    (wanted,) = torch.autograd.grad((sums * weights).sum() / 1.5, logits)
    assert close(islands.softmax_gradient(logits.detach(), sums.detach(), weights, 1.5, softcap), wanted)
    assert torch.equal(best, logits.argmax(-1))


# --------------------------------------------------------------------------- compiling


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[..., Any]]]:
    """What takes the compiler's place; by default it changes nothing. What is compiled in a test is forgotten after."""
    chosen: list[Callable[..., Any]] = [lambda graph, _: graph]
    torch.compiler.reset()
    monkeypatch.setattr(compiler, "backend", lambda: lambda graph, inputs: chosen[0](graph, inputs))
    monkeypatch.setattr(compiler, "_refused", {})
    everything = [value for value in vars(islands).values() if isinstance(value, Island)]
    for island in everything:
        monkeypatch.setattr(island, "_compiled", None)
        monkeypatch.setattr(island, "_known", set())
    yield chosen
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_islands_give_the_same_gradient(name: str, recompute: bool, backend: list[Callable[..., Any]]) -> None:
    model, adapter = lora_model(name)
    rows = make_rows(3, 8)
    with compiling(False):
        loss, wanted = our_gradient(model, adapter, rows, MicroBatchLimit(8))
    before = calls()
    with compiling(True), running_layers(model.model, recompute):
        got_loss, got = our_gradient(model, adapter, rows, MicroBatchLimit(3))
    assert calls() > before
    assert not refusals()
    assert got_loss == pytest.approx(loss, rel=1e-9)
    assert relative(got, wanted) < 1e-9


def test_batches_of_many_lengths_share_what_is_compiled(backend: list[Callable[..., Any]]) -> None:
    graphs: list[int] = []
    backend[0] = lambda graph, _: (graphs.append(1), graph)[1]
    model, adapter = lora_model("llama")
    counts = []
    with compiling(True):
        for seed in range(4):
            our_gradient(model, adapter, make_rows(seed, 4 + seed), MicroBatchLimit(8))
            counts.append(len(graphs))
    assert counts[0] > 5
    assert counts[3] == counts[1]


def test_a_compiler_that_fails_is_said_and_the_function_runs_as_it_is(backend: list[Callable[..., Any]]) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nwith a long story")

    backend[0] = broken
    x, weight = draw(3, 4), draw(4)
    with compiling(True):
        got = rms_norm(x, weight, 1e-5, False)
        assert not rms_norm.compiles(x)
    assert close(got, rms_norm.written(x, weight, 1e-5, False))
    (said,) = refusals()
    assert said == "rms_norm() is not compiled (RuntimeError: no C++ compiler was found); training is slower without it"


def test_a_compiler_that_gives_other_numbers_is_not_used(backend: list[Callable[..., Any]]) -> None:
    backend[0] = lambda graph, _: lambda *inputs: [1.5 * out for out in graph(*inputs)]
    x, weight = draw(3, 4), draw(4)
    with compiling(True):
        assert close(rms_norm(x, weight, 1e-5, False), rms_norm.written(x, weight, 1e-5, False))
    assert "differs by 50.0%" in refusals()[0]


def test_lack_of_memory_is_no_reason_to_refuse(backend: list[Callable[..., Any]]) -> None:
    def full(graph: Any, _: Any) -> Any:
        def run(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return run

    backend[0] = full
    with compiling(True), pytest.raises(torch.OutOfMemoryError):
        rms_norm(draw(3, 4), draw(4), 1e-5, False)
    assert not refusals()


def test_where_functions_are_compiled() -> None:
    here = draw(2)
    assert not rms_norm.compiles(here)
    with compiling(True):
        assert rms_norm.compiles(here)
        with compiling("auto"):
            assert not rms_norm.compiles(here)
        assert rms_norm.compiles(here)
    with compiling(False):
        assert not rms_norm.compiles(here)
