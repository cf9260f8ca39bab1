"""Jobs that really train a tiny model, from upload to a model that answers, with trouble on the way."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunery
from tests.serve.jobs.conftest import QUICK
from tests.serve.jobs.world import World, chat_rows, pair_rows, until
from tunery.console import Console
from tunery.paths import read_json
from tunery.serve.records import Job
from tunery.task_file import load_task

STEPS = 150
FULL_DISK = """
import os, pathlib

if flag := os.environ.get("FULL_DISK"):
    real = pathlib.Path.write_bytes

    def write_bytes(self, data):
        if os.path.exists(flag) and self.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        return real(self, data)

    pathlib.Path.write_bytes = write_bytes
"""
"""Python imports this at its start: while a flag file exists, the disk is full."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, base: str) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("home"), base, defaults=QUICK) as world:
        yield world


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """While this file exists, workers find the disk full when they write a checkpoint."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "sitecustomize.py").write_text(FULL_DISK)
    (folder / "flag").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULL_DISK", str(folder / "flag"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        yield folder / "flag"


@pytest.fixture(scope="module")
def finished(world: World, full_disk: Path) -> Job:
    """A supervised job that has met a full disk, was resumed, was paused and resumed again, and has succeeded."""
    numbers = {"n_epochs": 50, "batch_size": 8, "learning_rate_multiplier": 1.5}
    job = world.create(
        world.upload(chat_rows(24)),
        validation_file=world.upload(chat_rows(6, start=100)),
        suffix="films",
        seed=7,
        hyperparameters=numbers,
    )
    world.wait(job, "paused")
    last = world.events(job)[-1]
    assert last.level == "error"
    assert "disk is full" in last.message
    assert "resume the job" in last.message
    full_disk.unlink()
    assert world.jobs.resume(job.id).status == "queued"
    until(lambda: any(message.startswith("Step 20/") for message in world.messages(job)))
    assert world.jobs.get(job.id).estimated_finish is not None
    paused = world.jobs.pause(job.id)
    assert paused.status == "paused"
    assert paused.estimated_finish is None
    assert world.jobs.resume(job.id).status == "queued"
    return world.wait(job, "succeeded")


def test_trouble_on_the_way_leaves_no_trace_in_the_adapter(world: World, finished: Job, tmp_path: Path) -> None:
    folder = world.folder(finished)
    assert len(read_json(folder.run.receipt)["training"]["resumed_from"]) == 1
    task = load_task(folder.task).model_copy(update={"output": str(tmp_path)})
    undisturbed = tunery.train(task, progress=Console(quiet=True))
    weights = [run / "adapter" / "adapter_model.safetensors" for run in (folder.run.root, undisturbed.path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_run_is_that_of_any_task_and_its_model_is_named(world: World, finished: Job) -> None:
    run = world.jobs.run_dir(finished.id)
    receipt = read_json(run / "receipt.json")
    assert receipt["training"]["steps"] == STEPS
    assert receipt["training"]["learning_rate"] == pytest.approx(0.015)
    assert finished.trained_tokens == receipt["tokens"]["data"]
    assert finished.hyperparameters == {"n_epochs": 50, "batch_size": 8, "learning_rate_multiplier": 1.5}
    assert (run / "report.html").exists()
    evaluation = read_json(run / "evaluation.json")
    assert evaluation["rows"] == 6
    assert evaluation["tuned"]["loss"] < evaluation["base"]["loss"]
    served = world.registry.resolve(finished.fine_tuned_model or "")
    assert served.adapter == run / "adapter"
    assert tunery.load(run).answer([{"role": "user", "content": "film 3?"}], max_new_tokens=2)


def test_events_and_checkpoints_tell_the_run(world: World, finished: Job) -> None:
    messages = world.messages(finished)
    assert messages[:2] == [
        f"Created fine-tuning job: {finished.id}",
        f"Validating training file: {finished.training_file} and validation file: {finished.validation_file}",
    ]
    metrics = [event for event in world.events(finished) if event.type == "metrics"]
    assert [event.data["step"] for event in metrics if event.data] == list(range(1, STEPS + 1))
    lines = [json.loads(line) for line in (world.jobs.run_dir(finished.id) / "metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    assert validated
    shown = {event.data["step"]: event.data for event in metrics if event.data}
    for step, loss in validated.items():
        assert shown[step]["valid_loss"] == shown[step]["full_valid_loss"] == loss
    checkpoints = world.jobs.checkpoints(finished.id).data
    assert len(checkpoints) == 3
    assert checkpoints[0].step_number == STEPS
    assert checkpoints[0].metrics["valid_loss"] == validated[STEPS]
    assert all(f"Checkpoint created at step {checkpoint.step_number}" in messages for checkpoint in checkpoints)
    assert not [message for message in messages if str(world.home) in message]


def test_the_result_file_holds_every_step(world: World, finished: Job) -> None:
    (result,) = finished.result_files
    rows = list(csv.DictReader(world.files.content(result).read_text().splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, STEPS + 1)]
    assert all(0 <= float(row["train_accuracy"]) <= 1 for row in rows)
    assert rows[-1]["valid_loss"]


def test_a_checkpoint_answers_as_a_model(world: World, finished: Job) -> None:
    from tunery.lora.adapter import load_adapter
    from tunery.models.load import load_base

    last, *_ = world.jobs.checkpoints(finished.id).data
    adapter = world.registry.resolve(last.fine_tuned_model_checkpoint).adapter
    assert adapter is not None
    load_adapter(load_base(world.base, precision="float32").model, adapter)
    weights = [folder / "adapter_model.safetensors" for folder in (adapter, world.folder(finished).run.adapter)]
    assert weights[0].read_bytes() == weights[1].read_bytes()  # the last step's are the job's


def test_preferences_are_learned_on_from_a_fine_tuned_model(world: World, finished: Job) -> None:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 4, "batch_size": 4, "beta": 0.2}}}
    job = world.create(
        world.upload(pair_rows(24)),
        validation_file=world.upload(pair_rows(6, start=100)),
        model=finished.fine_tuned_model,
        suffix="taste",
        seed=7,
        method=method,
    )
    done = world.wait(job, "succeeded")
    assert done.model == finished.fine_tuned_model
    assert done.fine_tuned_model is not None
    assert done.fine_tuned_model.split(":")[-2] == "taste"
    assert done.method["dpo"]["hyperparameters"]["beta"] == 0.2
    margins = [
        event.data["valid_rewards_margin"]
        for event in world.events(job)
        if event.data and "valid_rewards_margin" in event.data
    ]
    assert margins[-1] > margins[0]
    receipt = read_json(world.folder(job).run.receipt)
    before = read_json(world.folder(finished).run.receipt)
    assert receipt["lora"]["start"]["sha256"] == before["adapter"]["sha256"]
