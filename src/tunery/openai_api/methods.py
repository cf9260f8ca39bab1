"""`method` of a fine-tuning job: how it trains, and with which hyperparameters.

Source: https://platform.openai.com/docs/api-reference/fine-tuning/create.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tunery.config import KindName, ObjectiveName
from tunery.jsonl import JsonMapping, JsonObject

COMMON = ("n_epochs", "batch_size", "learning_rate_multiplier")
"""Hyperparameters of every method."""

FEWEST_ROWS = 10
"""Rows that a training file holds at least."""

LARGEST_EPOCHS, LARGEST_BATCH, LONGEST_SUFFIX = 50, 256, 64


@dataclass(frozen=True)
class JobMethod:
    """One of the methods.

    Attributes:
        name: `method.type`.
        objective: what it minimises.
        kinds: of rows that it takes, the usual one first.
        extra: its hyperparameters besides COMMON; each is a setting of `train` with the same name.
        form: a line of its training files, in words.
    """

    name: str
    objective: ObjectiveName
    kinds: tuple[KindName, ...]
    extra: tuple[str, ...]
    form: str

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """All of them, by name."""
        return (*COMMON, *self.extra)


METHODS: Mapping[str, JobMethod] = {
    method.name: method
    for method in (
        JobMethod(
            "supervised",
            "sft",
            ("chat", "completion"),
            (),
            'each line of a file holds {"messages": […]}, or each {"prompt": …, "completion": …}',
        ),
        JobMethod(
            "dpo",
            "dpo",
            ("preference",),
            ("beta",),
            'each line of a file holds {"input": {"messages": […]}, "preferred_output": […], '
            '"non_preferred_output": […]}',
        ),
    )
}


def method_of(objective: ObjectiveName) -> JobMethod | None:
    """The method that minimises this; None if no server offers it."""
    return next((method for method in METHODS.values() if method.objective == objective), None)


def settled_hyperparameters(job: JsonMapping) -> JsonObject:
    """What the server settled on: in `method` where it fills that in, else in `hyperparameters`."""
    method = job.get("method") or {}
    asked = ((method.get(method.get("type")) or {}).get("hyperparameters")) or {}
    settled = job.get("hyperparameters") or {}
    names = {**settled, **asked}
    return {
        name: next((value for value in (asked.get(name), settled.get(name)) if value not in (None, "auto")), None)
        for name in names
    }
