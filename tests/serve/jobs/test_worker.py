"""The worker's own part: how errors become exit codes and reasons, and what it says while it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunery.config import Task
from tunery.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ModelError,
    ResumableError,
    StoppedError,
)
from tunery.progress import Note
from tunery.serve.jobs import worker
from tunery.serve.jobs.job_folder import JobFolder, read_error
from tunery.serve.jobs.validate import BadFileError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFolder:
    """A job's folder; this process's input is not watched."""
    monkeypatch.setattr(worker, "_stop_at_end_of_input", lambda: None)
    return JobFolder(tmp_path)


def gives_up(folder: JobFolder, monkeypatch: pytest.MonkeyPatch, error: Exception) -> int:
    def work(_: JobFolder) -> None:
        raise error

    monkeypatch.setattr(worker, "_train", work)
    return worker.main([str(folder.root)])


@pytest.mark.parametrize(
    ("error", "exit_code", "code", "param"),
    [
        (BadFileError("validation_file", "bad"), 3, "invalid_training_file", "validation_file"),
        (DataError("bad"), 3, "invalid_training_file", "training_file"),
        (ModelError("bad"), 2, "model_error", None),
        (ConfigError("bad"), 2, "invalid_configuration", None),
        (AdapterError("bad"), 4, "adapter_error", None),
        (CheckpointError("bad"), 4, "checkpoint_error", None),
        (DivergedError("bad"), 5, "training_diverged", None),
        (ResumableError("bad"), 75, "disk_full", None),
    ],
)
def test_an_error_has_its_exit_code_and_leaves_a_reason(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: int, code: str, param: str | None
) -> None:
    assert gives_up(folder, monkeypatch, error) == exit_code
    found = read_error(folder)
    assert found is not None
    assert (found["code"], found["param"]) == (code, param)
    assert found["message"].startswith("bad")


def test_reasons_have_no_advice_for_the_command_line_and_no_paths(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = DivergedError(f"{folder.root}/run: the loss is nan", "start over with --resume never")
    gives_up(folder, monkeypatch, error)
    found = read_error(folder)
    assert found is not None
    assert "--" not in found["message"]
    assert "learning_rate_multiplier" in found["message"]
    assert str(folder.root) not in found["message"]
    gives_up(folder, monkeypatch, ModelError("memory ran out", "choose a smaller model"))
    found = read_error(folder)
    assert found is not None
    assert found["message"] == "memory ran out. What helps: choose a smaller model"


def test_a_stop_leaves_no_reason_and_removes_an_older_one(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    gives_up(folder, monkeypatch, DataError("bad"))
    assert gives_up(folder, monkeypatch, StoppedError("stopped", signal_number=15)) == 143
    assert read_error(folder) is None


def test_a_bug_of_ours_fails_the_job_and_its_traceback_stays_in_the_log(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gives_up(folder, monkeypatch, ZeroDivisionError("secret detail")) == 1
    found = read_error(folder)
    assert found is not None
    assert found["code"] == "server_error"
    assert "secret" not in found["message"]
    assert "secret detail" in capsys.readouterr().err


def test_an_error_of_a_full_disk_is_told_apart_from_a_bug(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gives_up(folder, monkeypatch, OSError(28, "No space left on device")) == 75
    found = read_error(folder)
    assert found is not None
    assert "disk is full" in found["message"]
    assert "resume the job" in found["message"]


def test_two_workers_do_not_work_on_one_job(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(worker, "LOCK_SECONDS", 0.2)
    with FileLock(folder.lock):
        assert gives_up(folder, monkeypatch, AssertionError("it worked")) == 75
    found = read_error(folder)
    assert found is not None
    assert "another process" in found["message"]


def test_the_end_of_its_input_ends_a_worker_that_is_still_loading(tmp_path: Path) -> None:
    """As when the server is killed: the worker does not live on by itself."""
    program = (
        "import sys, time\nfrom tunery.serve.jobs import worker\n"
        "worker._train = lambda folder: (print('working', flush=True), time.sleep(120))\n"
        f"sys.exit(worker.main([{str(tmp_path)!r}]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"working\n"
    process.stdin.close()
    assert process.wait(timeout=60) == -15
    process.stdout.close()


def test_the_view_writes_the_plan_and_notes_without_paths(folder: JobFolder) -> None:
    data = {"train": "rows.jsonl", "validation": "more.jsonl"}
    task = Task.model_validate({"model": "m", "data": data})
    view = worker.StatusProgress(folder, task)
    view.start(88, 4)
    view.note(Note(f"resuming from step 4 ({folder.run.checkpoints / 'step-4'})"))
    view.note(Note("the loss rises", level="warn", command="--set train.learning_rate=1e-4"))
    view.note(Note("the validation loss rises", level="warn", hint="fewer epochs", command="--set train.epochs=1"))
    view.log({"step": 5})
    view.close()
    plan, note, *advice = map(json.loads, folder.status.read_text().splitlines())
    assert [(one["text"], one["level"]) for one in advice] == [
        ("the loss rises", "warn"),
        ("the validation loss rises → fewer epochs", "warn"),
    ]
    assert {key: plan[key] for key in ("kind", "total", "done", "eval_every")} == {
        "kind": "plan",
        "total": 88,
        "done": 4,
        "eval_every": 9,
    }
    assert (note["kind"], note["level"], note["text"]) == (
        "note",
        "info",
        "resuming from step 4 (run/checkpoints/step-4)",
    )
    alone = Task.model_validate({"model": "m", "data": {**data, "validation": None}})
    worker.StatusProgress(folder, alone).start(88, 0)
    assert json.loads(folder.status.read_text().splitlines()[-1])["eval_every"] is None


def test_what_a_killed_worker_left_half_written_is_removed(folder: JobFolder) -> None:
    kept = folder.run.checkpoints / "step-4"
    kept.mkdir(parents=True)
    for leftover in (".step-8.tmp-123", ".step-4.old-123"):
        (folder.run.checkpoints / leftover).mkdir()
        (folder.run.checkpoints / leftover / "x").touch()
    (folder.run.root / ".metrics.jsonl.tmp-123").touch()
    worker._remove_leftovers(folder)
    assert [path.name for path in folder.run.root.rglob("*")] == ["checkpoints", "step-4"]


def test_the_environment_of_trackers_reaches_the_training(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import tunery.api
    from tunery.serve.jobs.translate import JobSpec

    seen: list[Any] = []
    monkeypatch.setenv("WANDB_PROJECT", "before")
    monkeypatch.setattr(tunery.api, "train", lambda *_, **__: seen.append(os.environ["WANDB_PROJECT"]))
    spec = JobSpec("base", "supervised", 0, environment={"WANDB_PROJECT": "films"})
    folder.request.write_text(json.dumps(vars(spec)))
    folder.task.write_text("model: m\ndata:\n  train: rows.jsonl\n")
    assert worker.main([str(folder.root)]) == 0
    assert seen == ["films"]
