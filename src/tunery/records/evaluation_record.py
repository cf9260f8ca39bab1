"""evaluation.json: base vs. tuned on held-out rows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tunery.config import KindName
from tunery.records.typed_record import Record

VERSION = 1


class Evaluation(Record):
    """What both models made of the same rows. Metrics are those of tunery.evaluation.record.METRICS."""

    version: int = Field(default=VERSION, description="of this format")
    kind: KindName = Field(description="of the rows (data.kind)")
    objective: str = Field(default="", description="that the run was trained with (train.objective)")
    unit: str = Field(default="", description="what is counted: row or pair")
    split: str = Field(description="validation, test, or the name of a file")
    by: Literal["generation"] | None = Field(default=None, description="generation: judged by answers alone")
    rows: int = Field(description="rows (or pairs) measured")
    left_out: int = Field(default=0, description="rows that could not be measured")
    generated_rows: int | None = Field(default=None, description="rows answered by generating")
    labels: list[str] | None = Field(default=None, description="of a classification, in order")
    base: dict[str, Any] = Field(description="metrics of the base")
    tuned: dict[str, Any] = Field(description="metrics of the tuned model")
    samples: list[dict[str, Any]] = Field(description="rows with both answers, for a person")
    seconds: float | None = Field(default=None, description="that it took")
