"""`tunery runs`: every run in a line whatever its state, what sets runs apart, and what may be removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tunery
from tests.support.films import Films
from tunery.console import Console
from tunery.errors import CheckpointError, ConfigError
from tunery.evaluation.pruning import plan_pruning, prune
from tunery.evaluation.runs import compare_runs, list_runs
from tunery.paths import lock, run_lock

QUIET = Console(quiet=True)


@pytest.fixture
def runs(films: Films, tmp_path: Path) -> Path:
    """A folder with one finished run, that may be changed."""
    shutil.copytree(films.path, tmp_path / "runs" / "films")
    return tmp_path / "runs"


def test_a_run_in_a_line(runs: Path) -> None:
    (run,) = list_runs(runs)
    assert (run.name, run.state, run.kind) == ("films", "finished", "classification")
    assert (run.train_rows, run.held_out_rows, run.tuned_accuracy) == (64, 16, 1.0)
    assert run.base_accuracy is not None
    assert run.base_accuracy < 1
    files = [path.lstat().st_size for path in (runs / "films").rglob("*") if path.is_file()]
    assert run.bytes == sum(files)
    assert 0 < run.checkpoint_bytes < run.bytes
    assert [one.name for one in list_runs(runs / "films")] == ["films"]


def test_every_state_has_its_word(runs: Path) -> None:
    for name in ("broken", "half", "unmeasured", "odd"):
        shutil.copytree(runs / "films", runs / name)
    (runs / "broken" / "receipt.json").write_text("{")
    (runs / "half" / "receipt.json").unlink()
    (runs / "half" / "evaluation.json").unlink()
    (runs / "unmeasured" / "evaluation.json").unlink()
    (runs / "odd" / "receipt.json").write_text(json.dumps({"data": {"kind": "songs"}}))
    (runs / "notes").mkdir()
    (runs / "notes" / "task.yaml").write_text("a project, not a run")
    with lock(run_lock(runs / "films")):
        states = {run.name: (run.state, run.detail) for run in list_runs(runs)}
    assert {name: state for name, (state, _) in states.items()} == {
        "films": "in use",
        "broken": "damaged",
        "half": "unfinished",
        "unmeasured": "not evaluated",
        "odd": "damaged",
    }
    assert "stopped after step 24" in states["half"][1]
    assert "receipt.json cannot be read" in states["broken"][1]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        list_runs(tmp_path / "runs")
    assert list_runs(tmp_path) == []


def test_settings_that_differ_and_results_beside_each_other(
    films: Films, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(films.project)
    settings = ["train.max_steps=1", "lora.rank=2", f"output={runs}", "name=short"]
    tunery.train("task.yaml", settings, progress=QUIET)
    result = compare_runs([runs / "films", runs / "short"])
    assert result.settings["lora.rank"] == [4, 2]
    assert result.settings["train.max_steps"] == [None, 1]
    assert set(result.settings) == {"lora.rank", "train.max_steps", "output"}
    accuracy = result.results["accuracy"]
    assert accuracy.tuned[0] == 1.0
    assert accuracy.tuned[1] != 1.0
    assert accuracy.base[0] == accuracy.base[1]
    assert result.remarks == []
    receipt = json.loads((runs / "short" / "receipt.json").read_text())
    receipt["data"]["rows_sha256"]["validation"] = "other"
    (runs / "short" / "receipt.json").write_text(json.dumps(receipt))
    assert "different held-out rows" in compare_runs([runs / "films", runs / "short"]).remarks[0]


def test_comparing_what_is_not_there_is_a_clear_error(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    with pytest.raises(ConfigError, match="at least two"):
        compare_runs(["films"])
    with pytest.raises(ConfigError, match="did you mean films"):
        compare_runs(["films", "flims"])
    with pytest.raises(ConfigError, match="not a run directory"):
        compare_runs(["films", runs])
    shutil.copytree(runs / "films", runs / "broken")
    (runs / "broken" / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"broken/evaluation\.json cannot be read"):
        compare_runs(["films", "broken"])


def test_pruning_removes_checkpoints_of_finished_runs_and_nothing_else(
    runs: Path, films: Films, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "films", runs / "half")
    (runs / "half" / "receipt.json").unlink()
    (runs / ".films.tmp-999999999").mkdir()
    before = {path.relative_to(runs) for path in runs.rglob("*")}
    plan = plan_pruning(runs)
    assert plan.dry_run
    assert {Path(each.path).relative_to(runs).as_posix() for each in plan.removed} == {
        "films/checkpoints",
        ".films.tmp-999999999",
    }
    assert [Path(each.path).parent.name for each in plan.kept] == ["half"]
    assert {path.relative_to(runs) for path in runs.rglob("*")} == before
    done = prune(plan)
    assert not done.dry_run
    assert done.bytes == sum(each.bytes for each in plan.removed) > 0
    assert not (runs / "films" / "checkpoints").exists()
    assert (runs / "half" / "checkpoints").is_dir()
    assert (runs / "films" / "adapter" / "adapter_model.safetensors").is_file()
    monkeypatch.chdir(films.project)  # its base and rows
    assert tunery.load(runs / "films").predict(["film 3 is fine"])[0].prediction == "good"
    again = tunery.train("task.yaml", [f"output={runs}"], progress=QUIET)
    assert again.receipt["training"]["steps"] == 24


def test_checkpoints_that_are_needed_are_kept(runs: Path) -> None:
    shutil.copytree(runs / "films", runs / "next")
    task = (runs / "next" / "task.yaml").read_text()
    start = runs / "films" / "checkpoints" / "step-24"
    assert "  start: null\n" in task
    for name in ("rank", "alpha", "targets", "exclude", "rank_stabilized", "variant"):
        task = "".join(line for line in task.splitlines(keepends=True) if not line.startswith(f"  {name}:"))
    (runs / "next" / "task.yaml").write_text(task.replace("  start: null\n", f"  start: {start}\n"))
    plan = plan_pruning(runs)
    assert [Path(each.path).parent.name for each in plan.removed] == ["next"]
    assert "starts from one of them" in plan.kept[0].reason
    with lock(run_lock(runs / "next")):
        done = prune(plan)
    assert done.removed == []
    assert (runs / "next" / "checkpoints").is_dir()
