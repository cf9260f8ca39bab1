"""What `tunery runs` says of run directories. docs/reference.md is generated from the descriptions here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tunery.config import KindName
from tunery.records.typed_record import Record

RunState = Literal["finished", "not evaluated", "in use", "unfinished", "damaged"]
"""Not evaluated: trained, without evaluation.json. In use: a process works in it. Unfinished: without a receipt."""


class RunSummary(Record):
    """A run directory in a line."""

    path: str = Field(description="its folder")
    name: str = Field(description="of the folder")
    state: RunState = Field(description="where it stands")
    detail: str = Field(default="", description="what to know of that state")
    created: str | None = Field(default=None, description="when it ended, UTC")
    base: str | None = Field(default=None, description="the model that was tuned")
    kind: KindName | None = Field(default=None, description="of the rows (data.kind)")
    train_rows: int | None = Field(default=None, description="rows (or pairs) trained on")
    held_out_rows: int | None = Field(default=None, description="rows (or pairs) measured")
    base_loss: float | None = Field(default=None, description="of the base on held-out rows")
    tuned_loss: float | None = Field(default=None, description="of the tuned model")
    base_accuracy: float | None = Field(default=None, description="of the base; of pairs, preference_accuracy")
    tuned_accuracy: float | None = Field(default=None, description="of the tuned model")
    bytes: int = Field(description="of all its files")
    checkpoint_bytes: int = Field(description="of those under checkpoints/")


class ComparedMetric(Record):
    """A metric of evaluation.json, run by run; null where a run lacks it."""

    base: list[float | None] = Field(description="of the bases")
    tuned: list[float | None] = Field(description="of the tuned models")


class RunComparison(Record):
    """Runs beside each other; every list is in their order."""

    runs: list[RunSummary]
    settings: dict[str, list[Any]] = Field(description="settings that differ → values")
    results: dict[str, ComparedMetric] = Field(description="metric → values")
    remarks: list[str] = Field(description="why results cannot be compared as they stand")


class PrunedPath(Record):
    """Something that is removed."""

    path: str = Field(description="file or folder")
    bytes: int = Field(description="that it takes")
    what: str = Field(description="why it is no longer needed")


class KeptPath(Record):
    """Checkpoints that are not removed."""

    path: str = Field(description="their folder")
    reason: str = Field(description="why they are kept")


class Pruning(Record):
    """What `tunery runs prune` removes."""

    removed: list[PrunedPath]
    kept: list[KeptPath]
    bytes: int = Field(description="freed in all")
    dry_run: bool = Field(description="true: nothing was removed")
