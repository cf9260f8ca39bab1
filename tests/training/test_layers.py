"""Compiled and recomputing layers give the gradient of plain ones, and leave nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.double import Double
from tests.training.test_gradients import lora_model, make_rows, our_gradient, padded_gradient, relative
from tunery.config import TrainConfig
from tunery.data.batching import flatten
from tunery.errors import ModelError
from tunery.lora.attach import disabled
from tunery.models.flat import FlatModel
from tunery.training import objective
from tunery.training.guard import MicroBatchLimit
from tunery.training.layers import Layers, compile_layers, running_layers, wants_compiling
from tunery.training.loss import batch_loss, mean_loss

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_recomputed_layers_give_the_same_gradient(name: str) -> None:
    model, adapter = lora_model(name)
    rows = make_rows(3, 6)
    _, wanted = our_gradient(model, adapter, rows, MicroBatchLimit(6))
    with running_layers(model.model, recompute=True):
        _, got = our_gradient(model, adapter, rows, MicroBatchLimit(6))
    assert relative(got, wanted) < 1e-12


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    model, _ = lora_model("llama")
    rows = make_rows(3, 6)

    def kept() -> int:
        numbers = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), model.running():
            batch_loss(model, flatten(rows))
        return numbers

    before = kept()
    with running_layers(model.model) as layers:
        layers.recompute()
        assert kept() < before / 3


def forwards(model: Any) -> list[bool]:
    """Of each layer: whether its forward pass is the class's own."""
    return ["forward" not in layer.__dict__ for layer in Layers(model).layers]


def test_layers_are_as_before_afterwards_even_after_an_error() -> None:
    model, _ = lora_model("llama")
    assert len(forwards(model.model)) == 2

    def interrupted() -> None:
        with running_layers(model.model, recompute=True) as layers:
            layers.compile("eager")
            assert not any(forwards(model.model))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert all(forwards(model.model))


class Counter:
    """A compiler that counts and changes nothing."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return graph


SLOW = [pytest.param(name, False, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "gpt_oss")]


@pytest.mark.parametrize(("name", "recompute"), [("llama", False), ("llama", True), *SLOW])
def test_compiled_layers_give_the_same_gradient_and_are_compiled_once_for_all_batches(
    name: str, recompute: bool
) -> None:
    model, adapter = lora_model(name)
    batches = [make_rows(seed, 3 + seed) for seed in range(4)]
    plain = [our_gradient(model, adapter, rows, MicroBatchLimit(8)) for rows in batches]
    validation = mean_loss(model, batches[0])[0]
    counter = Counter()
    with running_layers(model.model, recompute) as layers:
        said = compile_layers(layers, model, list(adapter.values()), counter)
        assert layers.compiled, said
        graphs = []
        for rows, (loss, wanted) in zip(batches, plain, strict=True):
            got_loss, got = our_gradient(model, adapter, rows, MicroBatchLimit(8))
            assert got_loss == pytest.approx(loss, rel=1e-6)
            assert relative(got, wanted) < 1e-5
            graphs.append(counter.graphs)
        assert mean_loss(model, batches[0])[0] == pytest.approx(validation, rel=1e-6)
        assert graphs[3] == graphs[1]  # the second may show which numbers vary
        evaluated = counter.graphs
        mean_loss(model, batches[1])
        assert counter.graphs == evaluated
    assert all(forwards(model.model))


def test_a_compiled_model_with_its_adapter_off_is_its_base() -> None:
    model, adapter = lora_model("llama")
    rows = make_rows(4, 5)
    with disabled(model.model):
        wanted = mean_loss(model, rows)[0]
    counter = Counter()
    with running_layers(model.model) as layers:
        compile_layers(layers, model, list(adapter.values()), counter)
        tuned = mean_loss(model, rows)[0]
        seen = []
        for _ in range(3):
            with disabled(model.model):
                assert mean_loss(model, rows)[0] == pytest.approx(wanted, rel=1e-6)
            assert mean_loss(model, rows)[0] == tuned
            seen.append(counter.graphs)
    assert seen[0] == seen[-1]
    assert abs(tuned - wanted) > 1e-3


def test_hooks_on_a_layer_still_run() -> None:
    model, adapter = lora_model("llama")
    calls = []
    layer = Layers(model.model).layers[0]
    with running_layers(model.model) as layers:
        compile_layers(layers, model, list(adapter.values()), "eager")
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        our_gradient(model, adapter, make_rows(1, 3), MicroBatchLimit(3))
        handle.remove()
    assert calls == [1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_pytorchs_own_compiler_gives_the_same_gradient_in_float64() -> None:
    with Double():
        model, adapter = lora_model("llama")
        rows = make_rows(3, 6)
        _, wanted = padded_gradient(model, adapter, rows)
        with running_layers(model.model) as layers:
            said = compile_layers(layers, model, list(adapter.values()))
            assert layers.compiled, said
            _, got = our_gradient(model, adapter, rows, MicroBatchLimit(6))
    assert relative(got, wanted) < 1e-9


def test_a_compiler_that_fails_is_said_and_training_goes_on_without() -> None:
    model, adapter = lora_model("llama")
    rows = make_rows(3, 6)
    _, wanted = our_gradient(model, adapter, rows, MicroBatchLimit(6))

    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nwith a long story")

    with running_layers(model.model) as layers:
        said = compile_layers(layers, model, list(adapter.values()), broken)
        assert not layers.compiled
        assert said == "not compiled: RuntimeError: no C++ compiler was found"
        assert all(forwards(model.model))
        _, got = our_gradient(model, adapter, rows, MicroBatchLimit(6))
    assert relative(got, wanted) == 0.0


def test_a_compiler_that_gives_other_numbers_is_not_used() -> None:
    model, adapter = lora_model("llama")

    def wrong(graph: torch.fx.GraphModule, _: Any) -> Any:
        return lambda *inputs: [
            out * 1.5 if isinstance(out, Tensor) and out.is_floating_point() else out for out in graph(*inputs)
        ]

    with running_layers(model.model) as layers:
        said = compile_layers(layers, model, list(adapter.values()), wrong)
        assert not layers.compiled
    assert "differ by" in said


def test_which_runs_are_compiled() -> None:
    auto, asked, off = (TrainConfig(compile=value) for value in ("auto", True, False))
    assert wants_compiling(auto, 0.0, 200, GPU) == (True, None)
    assert wants_compiling(auto, 0.0, 199, GPU) == (False, None)
    assert wants_compiling(auto, 0.0, 10_000, CPU) == (False, None)
    assert wants_compiling(auto, 0.1, 10_000, GPU) == (False, None)
    assert wants_compiling(asked, 0.0, 1, CPU) == (True, None)
    assert wants_compiling(off, 0.0, 10_000, GPU) == (False, None)
    wanted, remark = wants_compiling(asked, 0.1, 10_000, GPU)
    assert not wanted
    assert "lora.dropout" in str(remark)


def test_a_model_without_such_layers_is_not_compiled() -> None:
    plain = torch.nn.Linear(2, 2)
    flat = FlatModel(plain, flattened=False, head=None)
    with running_layers(plain, recompute=True) as layers:
        assert "no decoder layers" in compile_layers(layers, flat, [])


# --------------------------------------------------------------------------- memory


def tight(monkeypatch: pytest.MonkeyPatch, layers: Layers, enough: bool = True) -> None:
    """A GPU whose memory holds one row, and only if its activations are recomputed."""
    real = objective.batch_loss

    def failing(model: FlatModel, batch: Any) -> Any:
        if not (layers.recomputing and enough):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch)

    monkeypatch.setattr(objective, "batch_loss", failing)


def test_with_one_row_left_activations_are_recomputed_and_the_update_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, adapter = lora_model("llama")
    rows = make_rows(7, 5)
    _, wanted = our_gradient(model, adapter, rows, MicroBatchLimit(1))  # test_gradients: the same as all five at once
    with running_layers(model.model) as layers:
        tight(monkeypatch, layers)
        limit = MicroBatchLimit(5, recompute=layers.recompute)
        _, got = our_gradient(model, adapter, rows, limit)
    assert (limit.rows, limit.halvings, limit.recomputing) == (1, 3, True)
    assert limit.describe() == "1 row at a time, recomputing activations (slower)"
    assert relative(got, wanted) < 1e-9


@pytest.mark.parametrize("allowed", [True, False])
def test_when_even_that_is_too_much_the_run_stops_and_says_what_helps(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = lora_model("llama")
    with running_layers(model.model) as layers:
        tight(monkeypatch, layers, enough=False)
        limit = MicroBatchLimit(4, recompute=layers.recompute if allowed else None)
        with pytest.raises(ModelError, match="single row") as error:
            our_gradient(model, adapter, make_rows(7, 4), limit)
    assert ("gradient_checkpointing" in str(error.value.hint)) is not allowed


def test_what_a_failed_step_held_is_free_before_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second try would run out of memory for what the first one left."""
    import weakref

    model, adapter = lora_model("llama")
    real, alive = objective.batch_loss, []
    held: list[Any] = []

    def watched(model: FlatModel, batch: Any) -> Any:
        alive.append(sum(reference() is not None for reference in held))
        loss = real(model, batch)
        held.append(weakref.ref(loss.total))
        if len(held) == 1:

            def fail(_: Tensor) -> Tensor:
                raise torch.OutOfMemoryError("CUDA out of memory.")

            loss.total.register_hook(fail)
        return loss

    monkeypatch.setattr(objective, "batch_loss", watched)
    our_gradient(model, adapter, make_rows(7, 4), MicroBatchLimit(4))
    assert alive[:2] == [0, 0]
