"""A tuned model's answers for rows in the form of its task, whose own answers need not be there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tunery.data.example import ROW, Example, Place, Problem
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import STAND_IN, Kind
from tunery.data.problem_list import bad_rows
from tunery.data.row_report import Report, describe, says_nothing
from tunery.data.source import RawRow, Source
from tunery.errors import ConfigError, DataError
from tunery.evaluation.answers import Answer, Question
from tunery.evaluation.labels import label_rows, score_labels
from tunery.evaluation.local_answers import answers_of
from tunery.given_rows import rows_of
from tunery.inference.generate import Sampling
from tunery.jsonl import JsonMapping, JsonObject
from tunery.progress import Say
from tunery.records.prediction_record import Prediction
from tunery.records.run_receipt import DataSection
from tunery.training.scoring import Scorer, scoring

if TYPE_CHECKING:
    from tunery.evaluation.tuned import TunedModel

CLASSIFIED, ANSWERED = 128, 16
"""Rows that are classified, or answered, together: after so many, what is done is safe."""


PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class AskedRow:
    """A row to predict: as it was given, and as it is put to the model."""

    given: JsonMapping
    example: Example


def read_asked(source: Source, facts: DataSection) -> list[AskedRow]:
    """All rows of a file that is to be predicted.

    Args:
        facts: kind and columns, as the run's receipt has them.

    Raises:
        ConfigError: a column that the question stands in is missing.
        DataError: rows that cannot be read, each as file:line:field; or there are none.
    """
    found: list[AskedRow] = []
    problems: list[Problem] = []
    total = bad = 0
    for item in source.items:
        total += 1
        result = _asked(source.shown, item, facts) if isinstance(item, RawRow) else item
        if isinstance(result, list):
            bad += 1
            problems += result
        else:
            found.append(result)
    if not total:
        raise DataError(f"{source.shown} holds no rows", "add some, or name another file")
    if problems:
        _require_columns(source.shown, found, problems, facts)
        raise bad_rows(problems, bad, total, "fix these rows, or remove them")
    return found


def _require_columns(shown: str, found: Sequence[AskedRow], problems: Sequence[Problem], facts: DataSection) -> None:
    """Where one column is missing from every row, say so once."""
    kind = KINDS[facts.kind]
    for role in (role for role in kind.missing(()) if role not in kind.stand_ins):
        column = facts.columns.get(role, role)
        if not found and all((problem.field, problem.message) == (column, "missing") for problem in problems):
            fixes = dict.fromkeys(problem.fix for problem in problems)
            raise ConfigError(f"{shown} has no column {column!r}, the {role} in the training rows", next(iter(fixes)))


def not_asked(rows: Sequence[AskedRow], facts: DataSection) -> list[str]:
    """Columns whose names say that they matter, and that the model is not told of, because the run was trained without
    them."""
    meant = {name for meaning in KINDS[facts.kind].meanings for name in meaning.names}
    known = {*facts.columns.values(), *facts.columns_ignored}
    names = dict.fromkeys(name for row in rows for name in row.given if not says_nothing(row.given[name]))
    return [name for name in names if name not in known and name.strip().casefold() in meant]


def _asked(file: str, row: RawRow, facts: DataSection) -> AskedRow | list[Problem]:
    kind, where = KINDS[facts.kind], Place(file, row.line)
    if isinstance(row.value, str):
        if not kind.plain_text:
            return [Problem(file, row.line, ROW, f"plain text cannot be a row of kind {kind.name}", "give a table")]
        return AskedRow({"text": row.value}, Example(kind.name, where, text=row.value))
    report = Report(file, row.line, facts.columns_ignored)
    fields = kind.parse_question(report, row.value, facts.columns)
    return report.problems or AskedRow(row.value, Example(kind.name, where, **fields))


def asked_rows(rows: Iterable[object], facts: DataSection) -> list[AskedRow]:
    """Rows given in Python: objects in the form of the task, or texts, each put as `TunedModel.answer` puts it.

    Raises:
        ConfigError: a single row is given instead of several.
        DataError: rows that cannot be read, each as row:N:field.
    """
    if isinstance(rows, str | Mapping):
        raise ConfigError("rows are a list, and this is a single one", "put it in brackets: predict([row])")
    kind = KINDS[facts.kind]
    results = [_given(kind, number, row, facts) for number, row in enumerate(rows_of(rows), start=1)]
    found = [result for result in results if not isinstance(result, list)]
    if bad := [result for result in results if isinstance(result, list)]:
        raise bad_rows([one for problems in bad for one in problems], len(bad), len(results), "fix these rows")
    return found


def _given(kind: Kind, number: int, row: object, facts: DataSection) -> AskedRow | list[Problem]:
    """A row given in Python, or what is wrong with it."""
    where = Place("row", number)
    if isinstance(row, str) and row.strip():
        example = Example(kind.name, where, text=row) if kind.plain_text else kind.make(where, row, STAND_IN)
        return AskedRow({"text": row}, example)
    if isinstance(row, Mapping):
        return _asked(where.file, RawRow(number, dict(row)), facts)
    what = "empty" if isinstance(row, str) else f"an object or a text is needed, not {describe(row)}"
    return [Problem(where.file, number, ROW, what, 'give rows such as {"text": "…"}')]


# --------------------------------------------------------------------------- predictions


@dataclass
class Shortened:
    """How many texts were too long, and were classified without their end."""

    count: int = 0


def predict_all(
    tuned: TunedModel, rows: Sequence[AskedRow], sampling: Sampling, note: Say, shortened: Shortened | None = None
) -> Iterator[list[Prediction]]:
    """Predictions in the order of the rows, some at a time."""
    shortened = shortened or Shortened()
    if not rows:
        return
    if not tuned.renderer.labels:
        for part in _batched(rows, ANSWERED):
            yield _answered(tuned, part, sampling)
        return
    with ExitStack() as stack:
        score = Scorer(tuned.flat)
        if len(rows) > CLASSIFIED:
            sample = label_rows(tuned.renderer, _labelled(tuned, rows[:CLASSIFIED]), tuned.limit).rows
            score = stack.enter_context(scoring(tuned.flat, sample, tuned.task.train.cpu_workers, note))
        for part in _batched(rows, CLASSIFIED):
            yield _classified(tuned, score, part, shortened)


def _batched(rows: Sequence[AskedRow], size: int) -> Iterator[Sequence[AskedRow]]:
    return (rows[at : at + size] for at in range(0, len(rows), size))


def _labelled(tuned: TunedModel, rows: Sequence[AskedRow]) -> list[Example]:
    """With a label that exists, so that every label can take its place."""
    return [replace(row.example, label=tuned.renderer.labels[0]) for row in rows]


def _classified(tuned: TunedModel, score: Scorer, rows: Sequence[AskedRow], shortened: Shortened) -> list[Prediction]:
    labels = tuned.renderer.labels
    given = label_rows(tuned.renderer, _labelled(tuned, rows), tuned.limit, tuned.task.data.too_long)
    shortened.count += len(given.cut)
    reason = f"longer than {tuned.limit:,} tokens"
    found = [Prediction(prediction=None, reason=reason) for _ in rows]
    if given.examples:
        scores = score_labels(score, given, len(labels))
        for number, best, shares in zip(given.examples, scores.predicted, scores.probability, strict=True):
            found[number] = Prediction(
                prediction=labels[best],
                probability=float(shares[best]),
                probabilities=dict(zip(labels, map(float, shares), strict=True)),
            )
    return found


def _answered(tuned: TunedModel, rows: Sequence[AskedRow], sampling: Sampling) -> list[Prediction]:
    return [_said(answer) for answer in answers_of(tuned, [_question(tuned, row.example) for row in rows], sampling)]


def _said(answer: Answer) -> Prediction:
    if answer.refused:
        return Prediction(prediction=None, reason=answer.refused)
    if answer.finish_reason == "length":
        return Prediction(prediction=answer.text, cut=True)
    return Prediction(prediction=answer.text)


def _question(tuned: TunedModel, example: Example) -> Question:
    kind = KINDS[example.kind]
    if (prompt := kind.prompt_text(example)) is not None:
        return Question(example.where, (), prompt=prompt)
    return Question(example.where, tuple(kind.question(tuned.renderer, example)), tuple(map(dict, example.tools)))


def predictions_of(tuned: TunedModel, rows: Iterable[object], sampling: Sampling, note: Say) -> list[Prediction]:
    """As `TunedModel.predict`."""
    parts = predict_all(tuned, asked_rows(rows, tuned.receipt.data), sampling, note)
    return [prediction for part in parts for prediction in part]


def without_prediction(rows: Sequence[AskedRow], predictions: Sequence[JsonObject]) -> DataError | None:
    """The error that names the rows that have none; None where all have one."""
    missing = [
        f"{row.example.where}: {said.get('reason') or 'no prediction'}"
        for row, said in zip(rows, predictions, strict=True)
        if said["prediction"] is None
    ]
    if not missing:
        return None
    more = [f"… and {len(missing) - PROBLEMS_SHOWN:,} more"] if len(missing) > PROBLEMS_SHOWN else []
    lines = [f"{len(missing):,} of {len(rows):,} rows have no prediction:", *missing[:PROBLEMS_SHOWN], *more]
    return DataError("\n".join(lines), "shorten these rows; all others are predicted")
