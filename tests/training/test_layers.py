"""Recomputing layers give the gradient of plain ones, and leave nothing behind."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.test_gradients import lora_model, make_rows, our_gradient, relative
from tunery.data.batching import flatten
from tunery.errors import ModelError
from tunery.fast.compile import compiling
from tunery.fast.packed_model import PackedModel
from tunery.training.guard import MicroBatchLimit
from tunery.training.layers import Layers, running_layers, try_compiling
from tunery.training.loss import batch_loss
from tunery.training.objectives import sft


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
            assert layers.recomputing
            assert not any(forwards(model.model))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert all(forwards(model.model))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_pytorchs_own_compiler_gives_the_same_gradient() -> None:
    model, adapter = lora_model("llama")
    rows = make_rows(3, 6)
    _, wanted = our_gradient(model, adapter, rows, MicroBatchLimit(6))
    with compiling(True):
        said = try_compiling(model, list(adapter.values()))
        assert said == ["element-wise functions are compiled (train.compile)"]
        _, got = our_gradient(model, adapter, rows, MicroBatchLimit(6))
    assert relative(got, wanted) < 1e-9


def test_where_nothing_is_compiled_nothing_is_said() -> None:
    model, adapter = lora_model("llama")
    assert try_compiling(model, list(adapter.values())) == []
    assert all(tensor.grad is None for tensor in adapter.values())


# --------------------------------------------------------------------------- memory


def tight(monkeypatch: pytest.MonkeyPatch, layers: Layers, enough: bool = True) -> None:
    """A GPU whose memory holds one row, and only if its activations are recomputed."""
    real = sft.batch_loss

    def failing(model: PackedModel, batch: Any) -> Any:
        if not (layers.recomputing and enough):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch)

    monkeypatch.setattr(sft, "batch_loss", failing)


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
    real, alive = sft.batch_loss, []
    held: list[Any] = []

    def watched(model: PackedModel, batch: Any) -> Any:
        alive.append(sum(reference() is not None for reference in held))
        loss = real(model, batch)
        held.append(weakref.ref(loss.total))
        if len(held) == 1:

            def fail(_: Tensor) -> Tensor:
                raise torch.OutOfMemoryError("CUDA out of memory.")

            loss.total.register_hook(fail)
        return loss

    monkeypatch.setattr(sft, "batch_loss", watched)
    our_gradient(model, adapter, make_rows(7, 4), MicroBatchLimit(4))
    assert alive[:2] == [0, 0]
