"""Every problem of a file as a value, with the rows that can be used beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import CHATML, tiny_tokenizer
from tunery.config import Columns, DataConfig
from tunery.data.examine import FILE, Examined, examine_files

STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML


def chat(question: str, answer: str | None = "yes", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    return {"messages": messages}


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def examine(content: list[Any] | str | bytes, kind: str = "chat", tokenizer: Any = None, **more: Any) -> Examined:
        if isinstance(content, list):
            content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content)
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return examine_files([str(path)], DataConfig(train="elsewhere.jsonl", kind=kind, **more), tokenizer)  # type: ignore[arg-type]

    return examine


def places(found: Examined) -> list[tuple[int, str]]:
    return [(problem.line, problem.field) for problem in found.problems]


def test_every_problem_is_listed_and_the_good_rows_are_kept(look: Any) -> None:
    found = look(
        [
            chat("one"),
            "{not json",
            chat("three", None),
            {"prompt": "four"},
            chat("five", weight=2),
            chat("six"),
        ]
    )
    assert (found.kind, found.rows) == ("chat", 6)
    assert [example.messages[0]["content"] for example in found.examples] == ["one", "six"]
    assert places(found) == [(2, "column 2"), (3, "messages[1].content"), (4, "messages"), (5, "messages[1].weight")]
    assert all(problem.file == "rows.jsonl" and problem.message and problem.fix for problem in found.problems)
    assert "skipped" not in " ".join(found.notes)


def test_a_good_file_has_no_problem(look: Any) -> None:
    found = look([chat("a"), chat("b")], tokenizer=tiny_tokenizer())
    assert (found.problems, found.rows, len(found.examples)) == ([], 2, 2)
    assert found.columns == {"messages": "messages"}


def test_rows_that_the_models_template_refuses_are_problems_in_their_place(look: Any) -> None:
    system = {"messages": [{"role": "system", "content": "s"}, *chat("b")["messages"]]}
    rows = [chat("a"), system, chat("c", None), system]
    assert places(look(rows)) == [(3, "messages[1].content")]
    found = look(rows, tokenizer=tiny_tokenizer(STRICT))
    assert places(found) == [(2, "(row)"), (3, "messages[1].content"), (4, "(row)")]
    assert "no system message" in found.problems[0].message
    assert "rows.jsonl:2" not in found.problems[0].message  # the place is said once
    assert len(found.examples) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no rows"),
        (b"\n\n", "no rows"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b'{"question": "a", "reply": "b"}\n', "messages"),
    ],
)
def test_what_concerns_the_whole_file_is_a_problem_too(look: Any, content: bytes, words: str) -> None:
    found = look(content)
    assert places(found) == [(0, FILE)]
    assert words in found.problems[0].message
    assert found.problems[0].fix
    assert found.examples == []


def test_a_file_of_broken_lines_only_names_each(look: Any) -> None:
    found = look("nonsense\nmore\n")
    assert places(found) == [(1, "column 1"), (2, "column 1")]
    assert (found.kind, found.rows) == (None, 2)


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    found = examine_files([str(tmp_path / "none.jsonl")], DataConfig(train="x", kind="chat"))
    assert places(found) == [(0, FILE)]
    assert "no file" in found.problems[0].message


def test_pairs_and_completions_are_examined_alike(look: Any) -> None:
    good = {
        "input": {"messages": [{"role": "user", "content": "q"}]},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": "b"}],
    }
    bad = {**good, "non_preferred_output": good["preferred_output"]}
    found = look([good, bad], kind="preference", tokenizer=tiny_tokenizer())
    assert places(found) == [(2, "non_preferred_output")]
    assert len(found.examples) == 1
    found = look([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}], kind="completion")
    assert places(found) == [(2, "completion")]


def test_a_file_beside_the_training_rows_is_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("note,team\nhello,red\nbye,blue\n")
    (tmp_path / "more.csv").write_text("note,team\nhey,green\nhi,red\n")
    config = DataConfig(train="x", columns=Columns(text="note", label="team"))
    train = examine_files([str(tmp_path / "train.csv")], config)
    assert (train.kind, train.labels) == ("classification", ("blue", "red"))
    more = examine_files([str(tmp_path / "more.csv")], config, split="validation", like=train)
    assert places(more) == [(2, "team")]
    assert "'green' is not one of the labels" in more.problems[0].message
    assert [(example.text, example.label) for example in more.examples] == [("hi", "red")]


def test_problems_of_several_files_stay_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in (chat("x"), chat("y", None))))
    found = examine_files(["b.jsonl", "a.jsonl"], DataConfig(train="x", kind="chat"), tiny_tokenizer())
    assert [(problem.file, problem.line) for problem in found.problems] == [("b.jsonl", 2), ("a.jsonl", 2)]
    assert (found.rows, len(found.examples)) == (4, 2)
