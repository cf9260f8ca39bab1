"""`train.objective`: what may be minimised on which rows."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunery
from tests.test_preference_run import QUIET, project  # noqa: F401 - a fixture
from tunery.errors import ConfigError, DataError

SHORT = ["train.max_steps=3", "evaluate.generate_rows=0"]


def test_supervised_training_on_pairs_takes_the_better_answers_alone(project: Path) -> None:  # noqa: F811
    report = tunery.check("task.yaml", ["train.objective=sft"], samples=2)
    assert report["training"]["unit"] == "row"
    assert report["sample_sides"] == ["chosen", "chosen"]
    both = tunery.check("task.yaml")
    assert report["data"]["train_rows"] == both["data"]["train_rows"]
    assert report["tokens"]["trained"] < both["tokens"]["trained"]
    run = tunery.train("task.yaml", ["train.objective=sft", "name=good", *SHORT], progress=QUIET)
    assert run.receipt["training"]["objective"] == "sft"
    assert run.receipt["data"]["kind"] == "preference"
    assert "preference" not in run.receipt
    assert run.evaluation is not None
    assert (run.evaluation["objective"], run.evaluation["unit"]) == ("sft", "row")
    assert run.evaluation["rows"] == run.receipt["data"]["validation_rows"]
    assert run.evaluation["tuned"]["loss"] < run.evaluation["base"]["loss"]


def test_the_other_objective_is_another_run(project: Path) -> None:  # noqa: F811
    tunery.train("task.yaml", SHORT, progress=QUIET)
    with pytest.raises(ConfigError, match=r"train\.objective: 'auto' → 'sft'"):
        tunery.train("task.yaml", ["train.objective=sft", *SHORT], progress=QUIET)


def test_pairs_are_needed_to_compare_answers(project: Path) -> None:  # noqa: F811
    (project / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "r", "completion": "b"}\n' * 9)
    settings = ["train.objective=dpo", "train.beta=null", "data.system=null", "data.validation=null"]
    for work in (tunery.check, tunery.train):
        with pytest.raises(ConfigError, match="dpo compares two answers to one prompt"):
            work("task.yaml", settings)


def test_a_setting_of_another_objective_is_refused_before_anything_is_read(project: Path) -> None:  # noqa: F811
    (project / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"train\.beta has no meaning for objective sft: it belongs to dpo"):
        tunery.check("task.yaml", ["train.objective=sft", "train.beta=0.2"])


def test_answers_that_supervised_training_leaves_out_are_counted(project: Path) -> None:  # noqa: F811
    run = tunery.train("task.yaml", ["train.objective=sft", "name=counted", *SHORT], progress=QUIET)
    assert run.receipt.data.dropped == run.receipt.data.train_rows + run.receipt.data.validation_rows
    assert "train.objective: sft" in run.receipt.data.dropped_rows[0]["reason"]
    assert any("rows were dropped" in warning for warning in run.receipt.warnings)


def test_no_row_left_is_said_and_not_a_traceback(project: Path) -> None:  # noqa: F811
    rows = [f'{{"prompt": "q{n}", "completion": "a", "label": false}}\n' for n in range(8)]
    (project / "rows.jsonl").write_text("".join(rows))
    for work in (tunery.check, tunery.train):
        with pytest.raises(DataError, match="no row is left to train"):
            work("task.yaml", ["train.objective=sft", "data.validation=2"])
