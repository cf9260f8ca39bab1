"""The rows of a captured job: what the hosted model learnt, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunery.config import DataConfig, KindName, Task
from tunery.data.example import DataSet, Example
from tunery.data.read import read_data
from tunery.errors import DataError
from tunery.hosted.capture import Capture
from tunery.hosted.equivalent import HELD_OUT
from tunery.hosted.given import common_labels, held_out_questions
from tunery.hosted.questions import Question


@dataclass(frozen=True)
class Rows:
    """See the module.

    Attributes:
        kind: of the rows.
        asked: the held-out rows, as questions.
        learnt: keys of the questions that the hosted model was trained on.
        labels: where the answers are labels; () elsewhere.
        problem: why training and validation file cannot be read as one set; "" if they can.
    """

    kind: KindName
    asked: list[Question]
    learnt: frozenset[str]
    labels: tuple[str, ...]
    problem: str = ""


def read_rows(capture: Capture) -> Rows:
    """What a captured job's files hold. Rows that cannot be read are left out; training names them, and stops.

    Raises:
        DataError: there is nothing to ask.
    """
    seed = int(capture.job.get("seed") or 0)
    training, problem = str(capture.training), ""
    try:
        data = _read(training, str(capture.validation) if capture.validation else HELD_OUT, seed)
    except DataError as error:
        if capture.validation is None:
            raise
        alone, problem = _read(str(capture.validation), None, seed), str(error)
        data = replace(alone, train=[], validation=alone.train)
    try:
        # alone, because of rows that are also in the validation file the hosted model has learnt all the same
        learnt = _questions(_read(training, None, seed))
    except DataError:
        learnt = []
    asked = held_out_questions(data)
    labels = common_labels(one.reference for one in (*learnt, *(asked if capture.validation else ())))
    return Rows(data.kind, asked, frozenset(one.key for one in learnt), labels, problem)


def learnt_here(task: Task) -> frozenset[str]:
    """Keys of the questions that a model trained on this task has learnt."""
    return frozenset(one.key for one in _questions(read_data(task.data, task.seed)))


def _read(train: str, validation: str | float | None, seed: int) -> DataSet:
    return read_data(DataConfig(train=train, validation=validation, on_bad_row="skip"), seed)


def _questions(data: DataSet) -> list[Question]:
    rows: Sequence[Example] = data.train
    return held_out_questions(replace(data, validation=list(rows)))
