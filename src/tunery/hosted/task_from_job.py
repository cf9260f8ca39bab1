"""A captured job as a task here: its settings, its rows, and what the hosted model is asked.

| job | task |
| --- | --- |
| `n_epochs` | `train.epochs` |
| `batch_size` | `train.batch_size` |
| `learning_rate_multiplier` | `train.learning_rate_multiplier`: times the rate that suits the model here |
| `beta` (dpo) | `train.beta` |
| `seed` | `seed` |
| training and validation file | `data.train`, `data.validation`; without the latter a tenth of the rows is held out |
| system messages | stay in the rows |

What the server does not say is taken as three epochs and the defaults here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tunery.config import USUAL_OBJECTIVE, DataConfig, EvaluateConfig, KindName, Task
from tunery.data.example import DataSet, Example
from tunery.data.kinds import KINDS
from tunery.data.prompts import Prompts
from tunery.data.read import read_data
from tunery.errors import DataError
from tunery.evaluation.answers import Question, question
from tunery.evaluation.label_reading import common_labels
from tunery.hosted.capture import TRAINING, VALIDATION, Capture
from tunery.jsonl import JsonObject
from tunery.openai_api.methods import method_of, settled_hyperparameters
from tunery.paths import safe_name

UNKNOWN_EPOCHS = 3
"""What such jobs mostly take, where they do not say."""

HELD_OUT = 0.1


def target_name(to: str) -> str:
    """The name of a run on this model."""
    return safe_name(Path(to).name if to.startswith((".", "/", "~")) else to)


def task_from_job(capture: Capture, to: str, output: Path, kind: KindName) -> str:
    """The task file for a captured job.

    Args:
        to: the base to train here.
        output: the folder that the run directory goes into; the task file lies there too.
        kind: of the rows.
    """
    asked = settled_hyperparameters(capture.job)
    train: JsonObject = {}
    for theirs, ours, default in (
        ("n_epochs", "epochs", UNKNOWN_EPOCHS),
        ("batch_size", "batch_size", None),
        ("learning_rate_multiplier", "learning_rate_multiplier", None),
        *((name, name, None) for name in _extra(kind)),
    ):
        value = default if asked.get(theirs) is None else asked[theirs]
        if value is not None:
            train[ours] = value
    folder = capture.folder.name
    task = {
        "name": target_name(to),
        "model": to,
        "output": str(output),
        "seed": int(capture.job.get("seed") or 0),
        "data": {
            "train": f"{folder}/{TRAINING}",
            "validation": f"{folder}/{VALIDATION}" if capture.validation else HELD_OUT,
            "kind": kind,
        },
        "train": train,
        "evaluate": {"max_new_tokens": 2 * EvaluateConfig().max_new_tokens},
    }
    return _head(capture) + yaml.safe_dump(task, sort_keys=False, allow_unicode=True)


def _extra(kind: KindName) -> tuple[str, ...]:
    """Hyperparameters of the method for such rows, besides those of all methods."""
    how = method_of(USUAL_OBJECTIVE[kind])
    return () if how is None else how.extra


# --------------------------------------------------------------------------- for a person


def mapping(capture: Capture, task: Task, kind: KindName) -> list[tuple[str, str, str]]:
    """(what, in the job, in the task that was trained here), for a person."""
    asked, train = settled_hyperparameters(capture.job), task.train
    rate = f"{train.learning_rate_multiplier:g}"
    if train.learning_rate != "auto":
        rate += f" (times {train.learning_rate:g})"
    return [
        ("Model", str(capture.job.get("model") or "not known"), task.model),
        (
            "Epochs",
            _said(asked.get("n_epochs")),
            f"{train.max_steps:,} steps" if train.max_steps else _said(train.epochs),
        ),
        ("Batch size", _said(asked.get("batch_size")), _said(train.batch_size)),
        ("Learning-rate multiplier", _said(asked.get("learning_rate_multiplier")), rate),
        *(
            (name.capitalize(), _said(asked.get(name)), _said(getattr(train, f"effective_{name}")))
            for name in _extra(kind)
        ),
        ("Seed", _said(capture.job.get("seed")), str(task.seed)),
        ("Held-out rows", VALIDATION if capture.validation else "none", _held_out(task.data.validation)),
    ]


def _held_out(validation: str | float | None) -> str:
    if validation is None or isinstance(validation, str):
        return "none" if validation is None else Path(validation).name
    return f"{validation:.0f} rows" if validation >= 1 else f"{validation:.0%} of the rows"


def _said(value: Any) -> str:
    return "not known" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _head(capture: Capture) -> str:
    whence = f"{capture.job['id']} ({capture.job['model']})" if capture.job else "files"
    return (
        f"# What {whence} was trained with, for a model here; written by `tunery migrate`, and yours to change.\n"
        "# The learning rate is the one that suits the model, times the job's multiplier.\n\n"
    )


# --------------------------------------------------------------------------- its rows


def _questions(examples: Iterable[Example]) -> list[Question]:
    """The rows of a job as its model is asked them; those with a tool call as answer are left out."""
    return [one for example in examples if (one := _as_asked(example)) is not None]


def _as_asked(example: Example) -> Question | None:
    if KINDS[example.kind].templated:
        return question(example, Prompts())
    return Question(
        example.where, (), reference=example.completion, shown=example.prompt, prompt=example.prompt
    )  # such a model completes; it knows no conversations


@dataclass(frozen=True)
class MovedRows:
    """The rows of a captured job: what its model learnt, and what it is asked.

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


def read_rows(capture: Capture) -> MovedRows:
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
        learnt = _questions(_read(training, None, seed).train)
    except DataError:
        learnt = []
    asked = _questions(data.validation)
    labels = common_labels(one.reference for one in (*learnt, *(asked if capture.validation else ())))
    return MovedRows(data.kind, asked, frozenset(one.key for one in learnt), labels, problem)


def learnt_here(task: Task) -> frozenset[str]:
    """Keys of the questions that a model trained on this task has learnt."""
    return frozenset(one.key for one in _questions(read_data(task.data, task.seed).train))


def _read(train: str, validation: str | float | None, seed: int) -> DataSet:
    return read_data(DataConfig(train=train, validation=validation, on_bad_row="skip"), seed)
