"""Kind feedback: one answer and whether it was good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_tokenizer
from tunery.config import DataConfig
from tunery.data.example import DataSet
from tunery.data.kinds import KINDS
from tunery.data.prepare import prepare, tokenize_once
from tunery.data.read import read_data
from tunery.errors import ConfigError, DataError


def read(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> DataSet:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return read_data(DataConfig(train=str(file), validation=None, **settings), 0)


def marked(label: Any, number: int = 0, name: str = "label") -> dict[str, Any]:
    return {"prompt": f"question {number}", "completion": f"answer {number}", name: label}


@pytest.mark.parametrize(
    ("good", "bad", "name"),
    [
        (True, False, "label"),
        (1, 0, "label"),
        (1, -1, "vote"),
        ("true", "False", "label"),
        ("thumbs_up", "thumbs_down", "feedback"),
        ("👍", "👎", "thumbs"),
        ("Good", "BAD", "rating"),
    ],
)
def test_verdicts_are_found_in_their_usual_forms(tmp_path: Path, good: Any, bad: Any, name: str) -> None:
    data = read(tmp_path, [marked(good, 0, name), marked(bad, 1, name)])
    assert data.kind == "feedback"
    first, second = data.train
    assert first.chosen == ({"role": "assistant", "content": "answer 0"},)
    assert first.rejected == ()
    assert second.chosen == ()
    assert second.rejected == ({"role": "assistant", "content": "answer 1"},)
    assert first.messages == ({"role": "user", "content": "question 0"},)
    assert "Answers marked good: 1; marked bad: 1." in data.notes


def test_a_conversation_is_judged_by_what_follows_the_user(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    data = read(tmp_path, [{"messages": talk, "label": True}, {"messages": talk[:3], "label": False}])
    assert data.kind == "feedback"
    assert [m["content"] for m in data.train[0].messages] == ["be kind", "a", "b", "c"]
    assert data.train[0].chosen == (talk[4],)
    assert data.train[1].rejected == (talk[2],)


def test_other_labels_leave_the_kind_as_it_was(tmp_path: Path) -> None:
    topics = [marked("billing"), marked("sales", 1)]
    with pytest.raises(ConfigError, match="kind completion has no use for label") as error:
        read(tmp_path, topics)
    assert "data.ignore_columns: [label]" in str(error.value)
    data = read(tmp_path, topics, ignore_columns=("label",))
    assert (data.kind, data.columns_ignored) == ("completion", {"label": 2})
    assert read(tmp_path, [{"text": "a", "label": "true"}, {"text": "b", "label": "false"}]).kind == "classification"


def test_what_is_wrong_with_a_row_is_said_with_its_place(tmp_path: Path) -> None:
    rows = [
        marked(True),
        marked("perhaps", 1),
        {"prompt": "q", "label": True},
        {"prompt": "q", "completion": " ", "label": False},
        {"prompt": "q", "completion": "a"},
    ]
    with pytest.raises(DataError) as error:
        read(tmp_path, rows, kind="feedback")
    text = str(error.value)
    assert "rows.jsonl:2:label: 'perhaps' does not say whether the answer is good" in text
    assert "rows.jsonl:3:completion: missing" in text
    assert "rows.jsonl:4:completion: the answer is empty" in text
    assert "rows.jsonl:5:label: missing" in text


def test_a_conversation_without_an_answer_is_refused(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "label": True}]
    with pytest.raises(DataError, match="no answer follows"):
        read(tmp_path, rows, kind="feedback")


def test_one_answer_with_both_verdicts_is_noted(tmp_path: Path) -> None:
    data = read(tmp_path, [marked(True), marked(False), marked(True, 1)])
    assert KINDS["feedback"].remarks(data.train) == ["answers that are marked good in one row and bad in another: 1"]


def test_only_the_answer_is_trained_and_its_verdict_comes_along(tmp_path: Path) -> None:
    data = read(tmp_path, [marked(True), marked(False, 1)], system="be kind")
    prepared = prepare(data, DataConfig(train="x", system="be kind"), tiny_tokenizer(), 512)
    assert [row.desirable for row in prepared.train.rows] == [True, False]
    tokenizer = prepared.renderer.tokenizer
    trained = [str(tokenizer.decode(row.ids[row.weights > 0].tolist())) for row in prepared.train.rows]
    assert trained == ["answer 0<|im_end|>", "answer 1<|im_end|>"]
    again = tokenize_once(prepared.renderer, data.train, prepared.max_length, "cut")
    assert [row.desirable for row in again.rows] == [True, False]  # from the cache
    assert again.sha256() == prepared.train.sha256()
    swapped = read(tmp_path, [marked(False), marked(True, 1)], system="be kind")
    assert tokenize_once(prepared.renderer, swapped.train, 512, "cut").sha256() != again.sha256()


def test_labels_and_instructions_have_no_meaning(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.labels has no meaning for kind feedback"):
        read(tmp_path, [marked(True)], kind="feedback", labels=("true", "false"))


def test_a_row_without_a_mark_is_reported_and_leaves_the_kind(tmp_path: Path) -> None:
    """Had they been taken for completions, the answers marked bad would have been trained."""
    rows = [marked(True), marked(None, 1), marked(False, 2), marked("", 3)]
    with pytest.raises(DataError) as error:
        read(tmp_path, rows)
    assert "rows.jsonl:2:label: missing (it is null)" in str(error.value)
    assert "rows.jsonl:4:label" in str(error.value)


def test_marks_as_pandas_writes_them_in_a_csv(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion,label\na,b,1.0\nc,d,0.0\n")
    data = read_data(DataConfig(train=str(file), validation=None), 0)
    assert data.kind == "feedback"
    assert [bool(row.chosen) for row in data.train] == [True, False]


@pytest.mark.parametrize(
    ("names", "columns", "message"),
    [
        (("comment", "stars"), {"label": "stars"}, "kind classification needs a column for the text"),
        (("q", "reply"), {"prompt": "q"}, "kind completion needs a column for the completion"),
        (("q", "reply"), {"completion": "reply"}, "kind completion needs a column for the prompt"),
    ],
)
def test_a_column_that_was_set_does_not_make_other_rows_feedback(
    tmp_path: Path, names: tuple[str, str], columns: dict[str, str], message: str
) -> None:
    rows = [dict(zip(names, (f"a {n}", "5"), strict=True)) for n in range(3)]
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, rows, columns=columns)


def test_the_answer_of_feedback_is_needed_and_said_once(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "said": "a", "label": True}] * 3
    with pytest.raises(ConfigError, match="kind feedback needs a column for the completion") as error:
        read(tmp_path, rows, kind="feedback")
    assert "data.columns.completion: NAME" in str(error.value)
