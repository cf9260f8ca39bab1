"""Rows given in Python become a file that a run can come back to."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunery.data.read import read_data
from tunery.errors import ConfigError
from tunery.given_rows import is_rows, keep_rows, plain_row
from tunery.task_file import resolve_task

ROWS = [{"text": f"film {n}", "label": ("good", "bad")[n % 2]} for n in range(10)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(**settings: Any) -> tuple[str, list[str]]:
    task = resolve_task(None, (), {"model": "smollm2-135m-instruct", **settings})
    return task.name, [row.text for row in read_data(task.data, task.seed).train]


def frame() -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(ROWS)


def dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(ROWS)


@pytest.mark.parametrize("make", [lambda: ROWS, lambda: tuple(ROWS), frame, dataset])
def test_rows_in_whatever_form(here: Path, make: Any) -> None:
    name, texts = trained(data={"train": make(), "validation": 2})
    assert len(texts) == 8
    assert set(texts) <= {row["text"] for row in ROWS}
    [file] = (here / "runs" / "rows").iterdir()
    assert file.stem == name  # the same rows are the same run
    assert [json.loads(line) for line in file.read_text().splitlines()] == ROWS


def test_data_alone_is_what_is_trained_and_the_output_is_heeded(here: Path) -> None:
    name, texts = trained(data=ROWS, output="elsewhere", name="films")
    assert (name, len(texts)) == ("films", 9)
    assert len(list((here / "elsewhere" / "rows").iterdir())) == 1


def test_a_dict_of_data_sets(here: Path) -> None:
    task = resolve_task(None, (), {"model": "smollm2-135m-instruct", "data": {"train": ROWS[:8], "test": ROWS[8:]}})
    assert len(read_data(task.data, 0).test) == 2
    assert len(list((here / "runs" / "rows").iterdir())) == 2


def test_files_are_still_files(here: Path) -> None:
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(trained(data=["a.jsonl"])[1]) == 9
    with pytest.raises(ConfigError, match=r"data\.train"):
        resolve_task(None, (), {"model": "smollm2-135m-instruct", "data": []})


def test_what_tables_hold_that_json_does_not(tmp_path: Path) -> None:
    row = {
        "number": np.int64(3),
        "share": np.float32(0.5),
        "missing": float("nan"),
        "list": np.array([1, 2]),
        "day": datetime.date(2024, 2, 29),
        "inside": [{"a": float("inf")}],
    }
    assert plain_row(row) == {
        "number": 3,
        "share": 0.5,
        "missing": None,
        "list": [1, 2],
        "day": "2024-02-29",
        "inside": [{"a": None}],
    }
    assert keep_rows([row], tmp_path) == keep_rows([dict(row)], tmp_path)


def test_what_is_not_rows() -> None:
    assert not any(map(is_rows, ["a.jsonl", ["a.jsonl"], [], {"train": "a"}, Path("a"), 0.1, None]))
