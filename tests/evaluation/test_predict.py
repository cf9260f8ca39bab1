"""`tunery predict` and `TunedModel.predict`: every row answered, in order, and kept whatever interrupts."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import tunery
from tests.support.films import Films
from tunery import api
from tunery.console import Console
from tunery.data.conversation import Report
from tunery.data.kinds import KINDS
from tunery.errors import ConfigError, DataError, StoppedError
from tunery.evaluation import predict as core
from tunery.evaluation import predict_file
from tunery.evaluation.tuned import TunedModel
from tunery.progress import Note

QUIET = Console(quiet=True)
PREDICTED = ["prediction", "probability", "probability of bad", "probability of good"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three hundred rows without labels, in a table with a column that the task does not know."""
    with open(tmp_path / "new.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "note", "text"])
        writer.writerows([f"0{i}", 'a,\n"b"', f"film {i % 80} is {'fine' if i % 2 else 'dull'}"] for i in range(300))
    return tmp_path / "new.csv"


@pytest.fixture(scope="session")
def tuned(films: Films) -> TunedModel:
    return tunery.load(films.path)


def test_every_row_comes_back_in_order_with_its_own_columns(films: Films, rows: Path, tmp_path: Path) -> None:
    done = api.predict(films.path, rows, tmp_path / "out.jsonl", progress=QUIET)
    found = lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [f"0{i}" for i in range(300)]
    assert found[3]["note"] == 'a,\n"b"'
    assert [row["prediction"] for row in found] == ["good" if i % 2 else "bad" for i in range(300)]
    assert found[3]["probability"] == max(found[3]["probabilities"].values())
    assert sum(found[3]["probabilities"].values()) == pytest.approx(1)
    assert (done.rows, done.predicted, done.labels) == (300, 300, {"bad": 150, "good": 150})
    assert {path.name for path in tmp_path.iterdir()} == {"new.csv", "out.jsonl"}


def test_a_column_that_matters_and_was_not_trained_is_named(films: Films, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"text": "film 1 is fine", "system": "Be strict.", "id": 1, "context": ""}\n')
    said: list[Note] = []

    class Hearing(Console):
        def note(self, note: Note) -> None:
            said.append(note)

    api.predict(films.path, tmp_path / "new.jsonl", tmp_path / "out.jsonl", progress=Hearing(quiet=True))
    [note] = [note for note in said if note.level == "warn"]
    assert note.message == "not put to the model, because the run was trained without it: system"
    assert lines(tmp_path / "out.jsonl")[0]["system"] == "Be strict."


def test_a_table_comes_back_as_a_table(films: Films, rows: Path, tmp_path: Path) -> None:
    api.predict(films.path, rows, tmp_path / "out.csv", progress=QUIET)
    with open(tmp_path / "out.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["id", "note", "text", *PREDICTED]
    assert (found[7]["id"], found[7]["prediction"]) == ("07", "good")
    assert found[7]["note"] == 'a,\n"b"'


def test_an_interruption_keeps_what_was_predicted(
    films: Films, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = core.predict_all

    def stopping(*arguments: Any) -> Iterator[list[Any]]:
        for number, part in enumerate(real(*arguments)):
            if number == 1:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(predict_file, "predict_all", stopping)
    out = tmp_path / "out.jsonl"
    with pytest.raises(StoppedError, match=r"128 of 300 rows are kept in .*out\.jsonl\.partial") as caught:
        api.predict(films.path, rows, out, progress=QUIET)
    assert caught.value.exit_code == 130
    assert not out.exists()
    (partial,) = tmp_path.glob("out.jsonl.partial-*.jsonl")
    assert [row["id"] for row in lines(partial)] == [f"0{i}" for i in range(128)]
    with open(partial, "a") as file:
        file.write('{"id": "0128", "te')  # as a crash leaves it

    asked: list[int] = []

    def counting(tuned: TunedModel, rest: Sequence[Any], *arguments: Any) -> Iterator[list[Any]]:
        asked.append(len(rest))
        return real(tuned, rest, *arguments)

    monkeypatch.setattr(predict_file, "predict_all", counting)
    done = api.predict(films.path, rows, out, progress=QUIET)
    assert asked == [172]
    assert done.resumed_from == 128
    assert [row["id"] for row in lines(out)] == [f"0{i}" for i in range(300)]
    assert not partial.exists()


def test_other_rows_do_not_resume_from_an_interrupted_call(films: Films, rows: Path, tmp_path: Path) -> None:
    facts, sampling = films.run.receipt, core.Sampling()
    first = predict_file.PredictedFile(str(rows), str(tmp_path / "out.jsonl"), facts, sampling)  # type: ignore[arg-type]
    rows.write_text(rows.read_text().replace("dull", "drab"))
    other = predict_file.PredictedFile(str(rows), str(tmp_path / "out.jsonl"), facts, sampling)  # type: ignore[arg-type]
    assert first.partial != other.partial


def test_standard_input_to_standard_output(
    films: Films, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Piped:
        buffer = io.BytesIO(b'{"text": "film 1 is fine", "n": 1}\n{"text": "film 2 is dull", "n": 2}\n')

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Piped())
    api.predict(films.path, "-", "-", progress=QUIET)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["n"], row["prediction"]) for row in found] == [(1, "good"), (2, "bad")]


def test_a_row_that_is_too_long_is_named_after_all_others_are_written(films: Films, tmp_path: Path) -> None:
    # the labels alone are longer than a limit of 5 tokens
    receipt = films.run.receipt.model_copy(deep=True)
    receipt["data"].max_length = 5
    (tmp_path / "new.jsonl").write_text('{"text": "film 1 is fine"}\n')
    out = tmp_path / "out.jsonl"
    file = predict_file.PredictedFile(str(tmp_path / "new.jsonl"), str(out), receipt, core.Sampling())  # type: ignore[arg-type]

    def load() -> TunedModel:
        tuned = tunery.load(films.path)
        tuned.receipt.data.max_length = 5
        return tuned

    with pytest.raises(DataError, match=r"1 of 1 rows have no prediction") as caught:
        file.predict(load, QUIET)
    assert "new.jsonl:1: longer than 5 tokens" in str(caught.value)
    assert lines(out)[0]["prediction"] is None
    assert lines(out)[0]["text"] == "film 1 is fine"


@pytest.mark.parametrize(
    ("content", "out", "words"),
    [
        ('{"text": "a", "prediction": "b"}\n', "out.jsonl", "has a column 'prediction' already"),
        ('{"txt": "a"}\n', "out.jsonl", "has no column 'text', the text in the training rows"),
        ('{"text": "a"}\n', "rows.jsonl", "is the file of the rows itself"),
        ('{"text": "a"}\n', "there.jsonl", "is there already"),
        ('{"text": "a"}\n', "out.xlsx", "written as .jsonl or .csv"),
        ('{"text": "a"}\n', "there.jsonl/out.jsonl", "its folder cannot be made"),
    ],
)
def test_nothing_is_lost_or_guessed(films: Films, tmp_path: Path, content: str, out: str, words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        api.predict(films.path, tmp_path / "rows.jsonl", tmp_path / out, progress=QUIET)
    assert words in str(caught.value)
    assert (tmp_path / "rows.jsonl").read_text() == content
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_all_bad_rows_are_listed_before_anything_is_computed(films: Films, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n{broken\n')
    with pytest.raises(DataError, match="2 problems in 2 of 3 rows") as caught:
        api.predict(films.path, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", progress=QUIET)
    assert "rows.jsonl:2:text" in str(caught.value)
    assert "rows.jsonl:3" in str(caught.value)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_python_takes_rows_and_texts(tuned: TunedModel) -> None:
    found = tuned.predict([{"text": "film 3 is fine"}, "film 4 is dull", {"text": "film 5 is fine", "label": "bad"}])
    assert [one.prediction for one in found] == ["good", "bad", "good"]
    assert found[0].probabilities is not None
    assert found[0].probability == pytest.approx(found[0].probabilities["good"])
    assert tuned.classify(["film 3 is fine"])[0]["good"] == pytest.approx(found[0].probability)
    with pytest.raises(DataError, match="row:2"):
        tuned.predict(["film", 3])
    for single in ("film 3 is fine", {"text": "film 3 is fine"}):
        with pytest.raises(ConfigError, match="this is a single one"):
            tuned.predict(single)
    with pytest.raises(ConfigError, match="max_tokens"):
        tuned.predict(["film"], max_tokens=3)


# --------------------------------------------------------------------------- other kinds


def asked(kind: str, row: dict[str, Any], columns: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    report = Report("rows.jsonl", 1)
    fields = KINDS[kind].parse_question(report, row, columns)  # type: ignore[index]
    return dict(fields), [problem.message for problem in report.problems]


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize("messages", [[USER], [USER, ANSWER], json.dumps([USER]), [{"from": "human", "value": "Hi"}]])
def test_a_conversation_is_answered_after_what_the_user_says(messages: object) -> None:
    fields, problems = asked("chat", {"messages": messages}, {"messages": "messages"})
    assert not problems
    assert [(m["role"], m["content"]) for m in fields["messages"][:-1]] == [("user", "Hi")]


def test_earlier_answers_stay_in_the_conversation() -> None:
    fields, _ = asked("chat", {"messages": [USER, ANSWER, USER, ANSWER]}, {"messages": "messages"})
    assert [m["role"] for m in fields["messages"][:-1]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("messages", [[], [ANSWER], "no json", None])
def test_a_conversation_without_a_question_is_a_problem(messages: object) -> None:
    assert asked("chat", {"messages": messages}, {"messages": "messages"})[1]


@pytest.mark.parametrize(
    ("kind", "row", "columns", "question"),
    [
        ("completion", {"q": "Say:"}, {"prompt": "q", "completion": "a"}, {"prompt": "Say:"}),
        ("completion", {"q": "Say:", "a": " no"}, {"prompt": "q", "completion": "a"}, {"prompt": "Say:"}),
        ("text", {"text": "Once"}, {"text": "text"}, {"text": "Once"}),
        ("classification", {"t": "Once"}, {"text": "t", "label": "l"}, {"text": "Once"}),
        (
            "preference",
            {"prompt": "Hi"},
            {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
            {"messages": (USER,)},
        ),
        (
            "preference",
            {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "No"}]},
            {"chosen": "chosen", "rejected": "rejected"},
            {"messages": (USER,)},
        ),
        (
            "feedback",
            {"prompt": "Hi"},
            {"prompt": "prompt", "completion": "answer", "label": "good"},
            {"messages": (USER,)},
        ),
        ("feedback", {"messages": [USER]}, {"messages": "messages", "label": "good"}, {"messages": (USER,)}),
    ],
)
def test_the_answer_of_a_row_may_be_absent(
    kind: str, row: dict[str, Any], columns: dict[str, str], question: dict[str, Any]
) -> None:
    fields, problems = asked(kind, row, columns)
    assert not problems
    assert {key: fields[key] for key in question} == question


def test_a_chat_run_answers_every_row(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"messages": [USER, ANSWER]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"id": i}) + "\n" for i in range(8)))
    (tmp_path / "task.yaml").write_text(
        f"name: hello\nmodel: {base_folder}\ndata:\n  train: rows.jsonl\n  validation: null\n"
        "train:\n  max_steps: 30\n  batch_size: 4\n  learning_rate: 0.02\n  precision: float32\n"
    )
    tunery.train("task.yaml", progress=QUIET)
    new = [{"messages": [USER], "id": 1}, {"messages": [USER, ANSWER], "id": 2}, {"messages": [USER] * 1, "id": 3}]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(one) + "\n" for one in new))
    done = api.predict("runs/hello", "new.jsonl", "out.jsonl", max_new_tokens=8, progress=QUIET)
    found = lines(tmp_path / "out.jsonl")
    assert [one["id"] for one in found] == [1, 2, 3]
    assert [one["prediction"] for one in found] == ["Hello"] * 3
    assert "probability" not in found[0]
    assert done.labels is None
    long = [{"messages": [{"role": "user", "content": "word " * 2000}]}, {"messages": [USER]}]
    said = tunery.load("runs/hello").predict(long, max_new_tokens=1)
    assert said[0].prediction is None
    assert "tokens; 512 fit, 1 of them for the answer" in (said[0].reason or "")
    assert said[1].cut is True
