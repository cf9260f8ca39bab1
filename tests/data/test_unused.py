"""Columns that carry meaning are used, refused by name, or set aside and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunery.config import Columns, DataConfig
from tunery.data.example import DataSet
from tunery.data.read import read_data, read_more
from tunery.errors import ConfigError, DataError

TALK = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> DataSet:
    return read_data(
        DataConfig(train=write(tmp_path / "rows.jsonl", list(rows)), **{"validation": None, **settings}), 0
    )


PROMPT = {"prompt": "Where?", "completion": "Here."}


@pytest.mark.parametrize("name", ["system", "system_prompt", "instructions", "System"])
def test_a_system_column_is_used(tmp_path: Path, name: str) -> None:
    for row in (PROMPT, {"messages": TALK}, {"conversations": [{"from": "human", "value": "Where?"}, TALK[1]]}):
        data = read(tmp_path, {**row, name: "Be brief."})
        assert data.kind == "chat"
        assert [m["content"] for m in data.train[0].messages] == ["Be brief.", "Where?", "Here."]


def test_a_system_column_of_answers_that_are_compared_or_marked(tmp_path: Path) -> None:
    pair = read(tmp_path, {"system": "Be brief.", "prompt": "Where?", "chosen": "Here.", "rejected": "Well."})
    assert [m["content"] for m in pair.train[0].messages] == ["Be brief.", "Where?"]
    whole = {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "Well."}]}
    assert read(tmp_path, {**whole, "system": "Be brief."}).train[0].messages[0]["content"] == "Be brief."
    marked = read(tmp_path, {**PROMPT, "system": "Be brief.", "label": True})
    assert [m["role"] for m in marked.train[0].messages] == ["system", "user"]


def test_two_system_messages_are_one_too_many(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *TALK]
    assert len(read(tmp_path, {"messages": messages, "system": "Be kind."}).train[0].messages) == 3
    with pytest.raises(DataError, match=r"rows\.jsonl:1:system: the conversation begins with a system message"):
        read(tmp_path, {"messages": messages, "system": "Be brief."})


def test_history_comes_before_the_prompt(tmp_path: Path) -> None:
    row = {"instruction": "And then?", "input": "", "output": "Home.", "history": [["Where first?", "To the shop."]]}
    data = read(tmp_path, row)
    assert [(m["role"], m["content"]) for m in data.train[0].messages] == [
        ("user", "Where first?"),
        ("assistant", "To the shop."),
        ("user", "And then?"),
        ("assistant", "Home."),
    ]
    assert "The answers in history are trained as every answer of a conversation is." in data.notes
    with pytest.raises(DataError, match=r"history\[0\]: a turn is a question and its answer"):
        read(tmp_path, {**row, "history": [["only one"]]})


def test_context_goes_under_the_prompt(tmp_path: Path) -> None:
    row = {"instruction": "When?", "context": "In 1990 it opened.", "response": "1990.", "category": "qa"}
    data = read(tmp_path, row, {**row, "context": ""})
    assert data.kind == "completion"
    assert [example.prompt for example in data.train] == ["When?\n\nIn 1990 it opened.", "When?"]
    assert data.columns_unused == ["category"]


def test_an_answer_beside_the_conversation_is_joined(tmp_path: Path) -> None:
    data = read(tmp_path, {"messages": TALK[:1], "output": "Here."})
    assert data.train[0].messages == tuple(TALK)
    assert len(read(tmp_path, {"messages": TALK, "output": "Here."}).train[0].messages) == 2
    with pytest.raises(DataError, match="the conversation ends with an answer, and this is another"):
        read(tmp_path, {"messages": TALK, "output": "There."})


def test_lists_as_prompt_and_completion_are_a_conversation(tmp_path: Path) -> None:
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data = read(tmp_path, {"prompt": [*earlier, TALK[0]], "completion": [TALK[1]]})
    assert data.kind == "chat"
    assert [m.get("weight") for m in data.train[0].messages] == [None, 0, None, None]


def test_data_kind_chat_takes_a_prompt_and_its_answer(tmp_path: Path) -> None:
    assert read(tmp_path, PROMPT, kind="chat").train[0].messages == tuple(TALK)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": "Which floats?", "choices": ["cork", "stone"], "answer": "cork"}, "choices"),
        ({"question": "Two of six?", "reasoning": "Twice six.", "answer": "12"}, "reasoning"),
        ({"messages": TALK, "documents": [{"text": "It left."}]}, "documents"),
        ({"messages": TALK, "images": ["a.png"]}, "images"),
        ({"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"messages": TALK, "weight": 0.5}, "weight"),
        ({"messages": TALK, "split": "test"}, "split"),
        ({"question": "When?", "sentence": "In 1990.", "label": "yes"}, "question"),
        ({"text": "a", "text_pair": "b", "label": "yes"}, "text_pair"),
        ({"text": "a", "completion": "b"}, "completion"),
        ({"text": "a", "label": "x", "system": "Be brief."}, "system"),
        ({"text": "a", "tools": [{"name": "f"}]}, "tools"),
        ({**PROMPT, "rating": 4}, "rating"),
    ],
)
def test_what_no_role_takes_is_refused_by_name(tmp_path: Path, row: dict[str, Any], column: str) -> None:
    other = {**row, **({"label": "no"} if "label" in row else {})}
    with pytest.raises(ConfigError, match=rf"has no use for {column} \(.*rows\.jsonl:1\)") as error:
        read(tmp_path, row, other)
    assert f"data.ignore_columns: [{column}]" in str(error.value)
    data = read(tmp_path, row, other, ignore_columns=(column,))
    assert data.columns_ignored == {column: 2}
    assert f"Columns set aside, with the rows in which they hold something: {column} (2)." in data.notes


def test_all_that_is_refused_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"images \(.*; weight \(") as error:
        read(tmp_path, {"messages": TALK, "images": ["a"], "weight": 2})
    assert "data.ignore_columns: [images, weight]" in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "system": "", "images": [], "weight": None, "documents": None},
        {"messages": TALK, "weight": 1, "split": "train"},
        {"messages": TALK, "prompt": "Where?", "prompt_id": "7"},
        {"instruction": "Where?", "input": "", "output": "Here.", "text": "### Where?\n### Here."},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system_prompt": None},
    ],
)
def test_what_says_nothing_or_is_said_elsewhere_passes(tmp_path: Path, row: dict[str, Any]) -> None:
    assert len(read(tmp_path, row).train) == 1


def test_columns_that_first_appear_late(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": TALK}] * 1500
    data = read(tmp_path, *rows, {"messages": TALK, "system": "Be brief.", "topic": "x"})
    assert data.train[-1].messages[0] == {"role": "system", "content": "Be brief."}
    assert data.columns["system"] == "system"
    assert any("system first appears at" in note and ":1501" in note for note in data.notes)
    assert data.columns_unused == ["topic"]
    texts = [{"text": f"t{n}"} for n in range(1500)]
    with pytest.raises(ConfigError, match=r"label \(.*rows\.jsonl:1501\)"):
        read(tmp_path, *texts, {"text": "a", "label": "x"})


def test_the_other_columns_of_a_role_that_was_set_are_set_aside(tmp_path: Path) -> None:
    row = {"review": "a", "sentence": "b"}
    data = read(tmp_path, row, columns=Columns(text="review"), kind="text")
    assert data.columns_ignored == {"sentence": 1}


def test_a_misspelt_column_to_ignore(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.ignore_columns: there is no column 'imges'") as error:
        read(tmp_path, {"messages": TALK, "images": []}, ignore_columns=("imges",))
    assert "did you mean images?" in str(error.value)


def test_a_finished_run_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    path = write(tmp_path / "more.jsonl", [{**PROMPT, "context": "It is near."}])
    columns = {"prompt": "prompt", "completion": "completion"}
    data = read_more(path, DataConfig(train="x"), "completion", (), columns)
    assert data.test[0].prompt == "Where?"
    assert data.columns_unused == ["context"]
