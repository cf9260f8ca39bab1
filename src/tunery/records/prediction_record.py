"""What models say of rows: of held-out ones, a line each in predictions.jsonl, and of any others (`tunery predict`).

docs/reference.md is generated from the descriptions here.
"""

from __future__ import annotations

from pydantic import Field

from tunery.records.typed_record import Record

STANDARD = "-"
"""Stands for standard input and output where a file is named."""


class Prediction(Record):
    """What a tuned model says of a row: the columns that `tunery predict` adds to it."""

    prediction: str | None = Field(description="the label, or the answer; null where there is none")
    probability: float | None = Field(default=None, description="of a classification: of that label among all labels")
    probabilities: dict[str, float] | None = Field(default=None, description="of a classification: label → probability")
    cut: bool | None = Field(default=None, description="true: the answer was cut at its longest length")
    reason: str | None = Field(default=None, description="why there is none")


class PredictionSummary(Record):
    """What `tunery predict` did with a file."""

    data: str = Field(description="the file, as it was named")
    out: str = Field(description="the file with the predictions; - for standard output")
    rows: int = Field(description="in the file")
    predicted: int = Field(description="rows with a prediction")
    cut: int = Field(description="answers cut at their longest length")
    shortened: int = Field(description="texts that were too long, classified without their end")
    resumed_from: int = Field(default=0, description="rows that an interrupted call had predicted")
    labels: dict[str, int] | None = Field(default=None, description="of a classification: label → rows predicted so")
    seconds: float = Field(description="that it took, loading included")
