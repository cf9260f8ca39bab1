"""Ctrl-C at a real terminal while a training goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.terminal import CTRL_C, terminal


@pytest.fixture
def project(tmp_path: Path, base_folder: Path) -> Path:
    """A task whose steps take seconds, with a checkpoint after each."""
    rows = [{"prompt": f"film {n}", "completion": "the best of films " * 100} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"name: slow\nmodel: {base_folder}\ndata:\n  train: rows.jsonl\n  validation: null\n"
        "train:\n  max_steps: 40\n  batch_size: 300\n  save_steps: 1\n  precision: float32\n  cpu_workers: 1\n"
    )
    return tmp_path


def test_the_first_ctrl_c_is_answered_at_once_and_the_run_resumes(project: Path) -> None:
    with terminal(["train", "task.yaml"], project) as training:
        training.expect("the first step was done")
        training.type(CTRL_C)
        training.expect("stopping: the step in progress is finished and a checkpoint is written")
        assert "stopped after step" not in training.seen
        stopped = training.expect(r"stopped after step \d+ of 40; the checkpoint is written")
        training.expect("run the same command again")
        assert training.wait() == 130
    step = int(stopped.rpartition("stopped after step ")[2].split()[0])
    assert (project / "runs" / "slow" / "checkpoints" / f"step-{step}").is_dir()


def test_the_second_ctrl_c_stops_at_once_and_says_what_is_kept(project: Path) -> None:
    with terminal(["train", "task.yaml"], project) as training:
        training.expect("the first step was done")
        training.type(CTRL_C)
        training.expect(r"a second\s+Ctrl-C would stop at once")
        training.type(CTRL_C)
        told = training.expect(r"the checkpoint of step \d+ is kept, and later steps are not")
        training.expect("run the same command again to resume from there")
        assert training.wait() == 130
    kept = int(told.rpartition("of step ")[2].split()[0])
    assert [entry.name for entry in (project / "runs" / "slow" / "checkpoints").glob("step-*")][-1] == f"step-{kept}"
    assert "Traceback" not in training.seen


def test_a_second_ctrl_c_before_the_first_checkpoint_says_that_nothing_is_kept(project: Path) -> None:
    with terminal(["train", "task.yaml", "--set", "train.save_steps=40"], project) as training:
        training.expect("the first step was done")
        training.type(CTRL_C)
        training.expect(r"a second\s+Ctrl-C would stop at once")
        training.type(CTRL_C)
        training.expect("nothing is kept")
        assert training.wait() == 130
    assert not (project / "runs" / "slow" / "checkpoints").exists()
