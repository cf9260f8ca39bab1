"""What a split does not allow to know is said before any compute, and again in the receipt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import tunery
from tests.support.films import write_films
from tunery.console import Console
from tunery.data.example import DataSet, Example, Place
from tunery.training.held_out import split_remarks


def examples(labels: Sequence[str]) -> list[Example]:
    return [Example("classification", Place("r", n), text=f"t{n}", label=label) for n, label in enumerate(labels)]


def remarks(train: Sequence[str], held_out: Sequence[str]) -> list[str]:
    names = tuple(sorted({*train, *held_out}))
    return split_remarks(DataSet("classification", {}, names, examples(train), examples(held_out), []))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (0, "no row is held out"),
        (1, "one validation row is held out: that tells nothing about others"),
        (8, "8 validation rows are held out: a share measured on so few is uncertain by about 28 points either way"),
    ],
)
def test_few_held_out_rows(rows: int, words: str) -> None:
    assert remarks(["a"] * 40, ["a"] * rows)[0].startswith(words)


def test_labels_with_few_rows_or_none_on_one_side() -> None:
    said = remarks(["a"] * 40 + ["b"] * 2, ["a"] * 40 + ["c"])
    assert said == [
        "labels without a training row, which cannot be learnt: c",
        "labels with few training rows: b (2)",
        "labels without a held-out row, of which nothing will be known: b",
    ]
    assert remarks(["a"] * 40 + ["b"] * 40, ["a", "b"] * 20) == []


def test_rows_that_contradict_each_other() -> None:
    rows = [*examples(["a", "b"] * 20), Example("classification", Place("r.csv", 41), text="t0", label="b")]
    held_out = examples(["a", "b"] * 20)
    [said] = split_remarks(DataSet("classification", {}, ("a", "b"), rows, held_out, []))
    assert said == "training texts that have one label in one row and another in another: 1 (such as r.csv:41)"


def test_check_receipt_and_report_say_it_and_the_rows_that_a_step_came_to(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_films(tmp_path, base_folder)
    few = "16 validation rows are held out"
    assert any(remark.startswith(few) for remark in tunery.check("task.yaml").remarks)
    run = tunery.train("task.yaml", ["train.max_steps=2"], progress=Console(quiet=True))
    receipt = json.loads((run.path / "receipt.json").read_text())
    assert (receipt["data"]["train_rows"], receipt["training"]["rows_seen"]) == (64, 16)
    assert any(warning.startswith(few) for warning in receipt["warnings"])
    assert "training ended after 16 of the 64 rows had been seen" in receipt["warnings"]
    page = (run.path / "report.html").read_text()
    assert few in page
    assert "training ended after 16 of the 64 rows had been seen" in page
