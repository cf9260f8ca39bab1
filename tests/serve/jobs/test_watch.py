"""Events and checkpoints from what a worker writes: each once, whatever is read again."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tunery.jsonl import append_lines
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.jobs.watch import Watch
from tunery.serve.records import Checkpoint, Event, Job, Work
from tunery.serve.store import Store

JOB, NAME = "ftjob-1", "ft:base:local::abcd1234"


class Run:
    """A job's folder, written to as a worker does."""

    def __init__(self, home: Path):
        self.store = Store(home / "server.sqlite3")
        self.store.add(Job(JOB, 1, "base", 0, "file-a"))
        self.store.add(Work(JOB, "base", NAME))
        self.folder = JobFolder(home / "job")
        self.folder.run.checkpoints.mkdir(parents=True)
        self.watch = self.new_watch()

    def new_watch(self, **more: Any) -> Watch:
        return Watch(self.store, JOB, self.folder, **more)

    def plan(self, total: int, eval_every: int | None = None) -> None:
        append_lines(
            self.folder.status, [{"kind": "plan", "total": total, "done": 0, "eval_every": eval_every, "at": 5.0}]
        )

    def note(self, text: str) -> None:
        append_lines(self.folder.status, [{"kind": "note", "text": text, "level": "info", "at": 6.0}])

    def step(self, step: int, loss: float = 1.0) -> None:
        line = {
            "step": step,
            "epoch": 0.1,
            "train_loss": loss,
            "train_token_accuracy": 0.5,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "data_tokens_per_second": 9.0,
            "seconds": 2.0,
        }
        append_lines(self.folder.run.metrics, [line])

    def validation(self, step: int, loss: float = 1.5) -> None:
        append_lines(self.folder.run.metrics, [{"step": step, "valid_loss": loss, "valid_token_accuracy": 0.25}])

    def checkpoint(self, step: int) -> None:
        (self.folder.run.checkpoints / f"step-{step}").mkdir()

    def replace_metrics(self, keep: int) -> None:
        """What a resumed run does to its metrics."""
        lines = self.folder.run.metrics.read_text().splitlines(keepends=True)
        new = self.folder.run.metrics.with_name("new")
        new.write_text("".join(line for line in lines if json.loads(line)["step"] <= keep))
        os.replace(new, self.folder.run.metrics)

    def events(self) -> list[Event]:
        return self.store.list(Event, owner=JOB, order="asc").data

    def messages(self) -> list[str]:
        return [event.message for event in self.events()]

    def checkpoints(self) -> list[Checkpoint]:
        return self.store.list(Checkpoint, owner=JOB).data


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_step_becomes_an_event_in_openais_form(run: Run) -> None:
    run.plan(88)
    run.step(5, 0.512)
    run.watch.poll()
    (event,) = run.events()
    assert (event.message, event.type, event.level) == ("Step 5/88: training loss=0.51", "metrics", "info")
    assert event.data == {"step": 5, "total_steps": 88, "train_loss": 0.512, "train_mean_token_accuracy": 0.5}


def test_a_validated_step_is_one_event_that_waits_for_its_validation(run: Run) -> None:
    run.plan(10, eval_every=4)
    run.step(3)
    run.step(4)
    run.watch.poll()
    assert run.messages() == ["Step 3/10: training loss=1.00"]
    run.validation(4)
    run.watch.poll()
    assert run.messages()[1:] == ["Step 4/10: training loss=1.00, validation loss=1.50"]
    data = run.events()[1].data
    assert data is not None
    assert (data["valid_loss"], data["valid_mean_token_accuracy"]) == (1.5, 0.25)
    assert "full_valid_loss" not in data
    run.step(10)
    run.watch.poll()
    assert len(run.messages()) == 2  # the last step is validated, whatever its number
    run.watch.poll(final=True)
    assert run.messages()[2:] == ["Step 10/10: training loss=1.00"]


def test_where_all_rows_were_validated_the_full_loss_is_given(run: Run) -> None:
    run.plan(4, eval_every=4)
    run.step(4)
    run.validation(4)
    run.checkpoint(4)
    run.new_watch(full_validation=True).poll()
    data = run.events()[0].data
    assert data is not None
    assert (data["full_valid_loss"], data["full_valid_mean_token_accuracy"]) == (1.5, 0.25)
    (checkpoint,) = run.checkpoints()
    assert checkpoint.metrics == {
        "step": 4,
        "train_loss": 1.0,
        "train_mean_token_accuracy": 0.5,
        "valid_loss": 1.5,
        "valid_mean_token_accuracy": 0.25,
        "full_valid_loss": 1.5,
        "full_valid_mean_token_accuracy": 0.25,
    }


def test_preference_metrics_keep_their_names(run: Run) -> None:
    run.plan(4, eval_every=1)
    append_lines(run.folder.run.metrics, [{"step": 1, "train_loss": 0.6, "rewards_margin": 0.2, "seconds": 1.0}])
    append_lines(run.folder.run.metrics, [{"step": 1, "valid_loss": 0.5, "valid_rewards_margin": 0.3, "seconds": 1.0}])
    run.watch.poll()
    (event,) = run.events()
    assert event.data == {
        "step": 1,
        "total_steps": 4,
        "train_loss": 0.6,
        "rewards_margin": 0.2,
        "valid_loss": 0.5,
        "valid_rewards_margin": 0.3,
    }


def test_reading_again_adds_nothing(run: Run) -> None:
    run.plan(4, eval_every=2)
    run.note("a note")
    for step in (1, 2, 3):
        run.step(step)
        if step == 2:
            run.validation(2)
            run.checkpoint(2)
    run.watch.poll()
    before, checkpoints = run.events(), run.checkpoints()
    run.watch.poll()
    run.new_watch().poll()  # another server
    run.note("a note")  # a resumed worker says it again
    run.new_watch().poll()
    assert run.events() == before
    assert run.checkpoints() == checkpoints


def test_steps_done_again_after_a_crash_are_told_once_and_with_their_validation(run: Run) -> None:
    run.plan(8, eval_every=4)
    run.checkpoint(2)
    for step in (1, 2, 3, 4):
        run.step(step)
    run.watch.poll()  # killed here: step 4 is trained, and its validation was on its way
    run.replace_metrics(keep=2)
    run.plan(8, eval_every=4)
    run.step(3)
    run.watch.poll()
    run.step(4)
    run.validation(4)
    run.step(5)
    run.watch.poll()
    steps = [message for message in run.messages() if message.startswith("Step")]
    assert steps == [
        "Step 1/8: training loss=1.00",
        "Step 2/8: training loss=1.00",
        "Step 3/8: training loss=1.00",
        "Step 4/8: training loss=1.00, validation loss=1.50",
        "Step 5/8: training loss=1.00",
    ]


def test_checkpoints_are_listed_while_the_run_keeps_them_or_an_adapter_was_made(run: Run) -> None:
    run.plan(9)
    for step in (3, 6):
        run.step(step, loss=step / 10)
        run.checkpoint(step)
    run.watch.poll()
    assert [checkpoint.step_number for checkpoint in run.checkpoints()] == [6, 3]
    newest = run.checkpoints()[0]
    assert newest.fine_tuned_model_checkpoint == f"{NAME}:ckpt-step-6"
    assert newest.fine_tuning_job_id == JOB
    assert newest.metrics == {"step": 6, "train_loss": 0.6, "train_mean_token_accuracy": 0.5}
    assert newest.id.startswith("ftckpt_")
    run.folder.exported(6).mkdir(parents=True)
    for step in (3, 6):
        shutil.rmtree(run.folder.run.checkpoints / f"step-{step}")
    run.checkpoint(9)
    run.watch.poll()
    assert [checkpoint.step_number for checkpoint in run.checkpoints()] == [9, 6]


def test_events_are_in_the_order_of_the_steps_also_when_they_are_read_late(run: Run) -> None:
    run.plan(6)
    run.note("training 14 layers")
    for step in range(1, 7):
        run.step(step)
        if step % 3 == 0:
            run.checkpoint(step)
    run.watch.poll()
    assert run.messages() == [
        "training 14 layers",
        *(f"Step {step}/6: training loss=1.00" for step in (1, 2, 3)),
        "Checkpoint created at step 3",
        *(f"Step {step}/6: training loss=1.00" for step in (4, 5, 6)),
        "Checkpoint created at step 6",
    ]


def test_what_the_worker_says_becomes_an_event_of_its_level(run: Run) -> None:
    run.note("computing in float32")
    append_lines(run.folder.status, [{"kind": "note", "text": "the loss rises", "level": "warn", "at": 7.5}])
    run.watch.poll()
    said = [(event.message, event.level, event.created_at, event.type) for event in run.events()]
    assert said == [("computing in float32", "info", 6, "message"), ("the loss rises", "warn", 7, "message")]


def test_what_could_not_be_kept_is_taken_up_next_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.plan(4)
    run.step(1)
    run.checkpoint(1)
    with monkeypatch.context() as patch:
        patch.setattr(run.watch, "_estimate", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.watch.poll()
    assert run.events() == []
    run.watch.poll()
    assert run.messages() == ["Step 1/4: training loss=1.00", "Checkpoint created at step 1"]
    assert [checkpoint.step_number for checkpoint in run.checkpoints()] == [1]


def test_the_end_is_estimated_from_the_pace(run: Run) -> None:
    run.plan(50)
    run.step(9)
    run.step(10)
    before = int(time.time())
    run.watch.poll()
    job = run.store.get(Job, JOB)
    assert job is not None
    assert job.estimated_finish is not None
    assert before + 40 * 2 <= job.estimated_finish <= time.time() + 40 * 2
