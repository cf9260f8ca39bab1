"""Runs that an earlier version made open, are judged and are resumed as before (tests/earlier)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tunery
from tunery.console import Console
from tunery.errors import CheckpointError

QUIET = Console(quiet=True)
SOURCE = Path(__file__).parent / "earlier"


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(SOURCE, tmp_path / "earlier")
    folder = tmp_path / "earlier"
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".yaml"):
            file.write_text(file.read_text().replace("/tmp/earlier", str(folder)))
    monkeypatch.chdir(folder)
    return folder


def test_a_finished_run_is_taken_as_it_is(earlier: Path) -> None:
    before = (earlier / "runs/labels/receipt.json").read_bytes()
    run = tunery.train("labels.yaml", progress=QUIET)
    assert (earlier / "runs/labels/receipt.json").read_bytes() == before
    assert run.receipt["training"]["steps"] == 12
    assert "8 held-out rows" in (earlier / "runs/labels/report.html").read_text()


def test_a_finished_run_answers_and_is_judged_as_then(earlier: Path) -> None:
    then = json.loads((earlier / "runs/labels/evaluation.json").read_text())
    tuned = tunery.load("runs/labels")
    (shares,) = tuned.classify(["a fine film 99"])
    assert set(shares) == {"good", "bad"}
    now = tunery.evaluate("runs/labels", progress=QUIET)
    for side in ("base", "tuned"):
        assert now[side]["accuracy"] == then[side]["accuracy"]
        assert now[side]["loss"] == pytest.approx(then[side]["loss"], rel=1e-5)


def test_an_interrupted_run_is_resumed(earlier: Path) -> None:
    run = tunery.train("taste.yaml", progress=QUIET)
    assert run.receipt["training"]["resumed_from"] == [5]
    assert run.receipt["training"]["steps"] == 10
    assert run.receipt["preference"]["beta"] == 0.1
    assert run.evaluation is not None
    assert run.evaluation["tuned"]["rewards_margin"] > 0


def test_a_setting_that_is_new_must_still_have_its_default(earlier: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train\.objective: 'auto' → 'sft'"):
        tunery.train("taste.yaml", ["train.objective=sft"], progress=QUIET)
