"""The loop with one step given ahead, as on a GPU, against the loop that waits for each step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.test_gradients import lora_model, make_rows
from tunery.config import TrainConfig
from tunery.errors import DivergedError, StoppedError
from tunery.fast.packed_model import PackedModel
from tunery.lora.dropout import DropoutClock
from tunery.progress import Note
from tunery.training.checkpoint import Checkpoints, TrainerState
from tunery.training.guard import MicroBatchLimit, StopRequest
from tunery.training.loop import Loop, Plan, make_optimizer
from tunery.training.objectives import sft
from tunery.training.objectives.sft import CrossEntropy

STEPS = 7


class Lines:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def note(self, note: Note) -> None: ...

    def start(self, total: int, done: int) -> None: ...

    def log(self, line: Mapping[str, Any]) -> None:
        self.lines.append({key: value for key, value in line.items() if "second" not in key})

    def close(self) -> None: ...


def make_loop(folder: Path, ahead: int, **plan: Any) -> tuple[Loop, Lines]:
    model, adapter = lora_model("llama")
    config = TrainConfig(batch_size=3, max_grad_norm=1.0, logging_steps=1)
    settings = {"eval_every": 3, "save_every": None, "restore_best": False} | plan
    progress = Lines()
    loop = Loop(
        plan=Plan(config, 0, CrossEntropy(), STEPS, 2, 4, 0.01, **settings),
        model=model,
        adapter=adapter,
        optimizer=make_optimizer(adapter, config),
        clock=DropoutClock(),
        train=make_rows(1, 12),
        validation=make_rows(2, 4),
        limit=MicroBatchLimit(8),
        checkpoints=Checkpoints(folder, {}, {}, {}),
        state=TrainerState(),
        progress=progress,
        stop=StopRequest(),
        history=[],
        ahead=ahead,
    )
    return loop, progress


def weights(loop: Loop) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in loop.adapter.values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_step_given_ahead_changes_neither_weights_nor_metrics(tmp_path: Path) -> None:
    waiting, waited = make_loop(tmp_path / "a", 0)
    running, ran = make_loop(tmp_path / "b", 1)
    given: list[int] = []
    real = running._settle

    def settle(step: Any) -> None:
        given.append(int(running.optimizer.state[next(iter(running.adapter.values()))]["step"]) - step.number)
        real(step)

    running._settle = settle  # type: ignore[method-assign]
    waiting.run()
    running.run()
    assert equal(weights(waiting), weights(running))
    assert ran.lines == waited.lines
    assert [line["step"] for line in ran.lines if "train_loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in ran.lines if "valid_loss" in line] == [3, 6, 7]
    assert running.checkpoints.steps() == waiting.checkpoints.steps() == [STEPS]
    # steps 3, 6 and 7 are followed by a validation: nothing was given after them before they were read
    assert given == [1, 1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("bad", [1, 2, 5])
def test_a_number_that_is_not_finite_never_reaches_the_weights(
    ahead: int, bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = make_loop(tmp_path / "a", 0, eval_every=None)
    seen: list[list[Tensor]] = [weights(reference)]
    real = reference._settle
    reference._settle = lambda step: (real(step), seen.append(weights(reference)))[0]  # type: ignore[method-assign]
    reference.run()

    loop, progress = make_loop(tmp_path / "b", ahead, eval_every=None)
    count = 0
    batch_loss = sft.batch_loss

    def spoilt(model: PackedModel, batch: Any) -> Any:
        nonlocal count
        count += 1
        loss = batch_loss(model, batch)
        return type(loss)(loss.total * float("nan"), loss.correct, loss.each) if count == bad else loss

    monkeypatch.setattr(sft, "batch_loss", spoilt)
    with pytest.raises(DivergedError, match=f"step {bad}: the loss is nan. The update was not made"):
        loop.run()
    assert count == bad + ahead
    assert loop.state.step == bad - 1
    assert [line["step"] for line in progress.lines] == list(range(1, bad))
    assert equal(weights(loop), seen[bad - 1])
    state = loop.optimizer.state[next(iter(loop.adapter.values()))]
    if bad > 1:
        assert int(state["step"]) == bad - 1
        assert bool(torch.isfinite(state["exp_avg"]).all())


def test_a_signal_stops_after_the_steps_that_were_given(tmp_path: Path) -> None:
    loop, _ = make_loop(tmp_path, 1, eval_every=None)
    real = loop._settle

    def settle(step: Any) -> None:
        real(step)
        if step.number == 2:
            loop.stop.signal_number = 2

    loop._settle = settle  # type: ignore[method-assign]
    with pytest.raises(StoppedError, match="stopped after step 4 of 7"):
        loop.run()
    assert loop.checkpoints.steps() == [4]
    other, _ = make_loop(tmp_path / "other", 0, eval_every=None)
    other.run()
    state = loop.checkpoints.load(loop.checkpoints.path(4), loop.adapter, loop.optimizer)
    loop.state, loop.stop = state, StopRequest()
    loop._settle = real  # type: ignore[method-assign]
    loop.run()
    assert equal(weights(loop), weights(other))
