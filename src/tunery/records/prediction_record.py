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


class HeldOutPrediction(Record):
    """What base and tuned model say of a held-out row. Log-probabilities are sums over an answer's tokens, in nats."""

    where: str = Field(description="file:line")
    input: str = Field(description="what the models were given")
    expected: str | None = Field(default=None, description="the label, or the answer, in the data")
    rejected: str | None = Field(default=None, description="the answer to avoid, in the data")
    base: str | None = Field(default=None, description="label or answer of the base; null where none was generated")
    tuned: str | None = Field(default=None, description="the same of the tuned model")
    base_probability: float | None = Field(default=None, description="of the base's label")
    tuned_probability: float | None = Field(default=None, description="of the tuned model's label")
    base_log_probability: float | None = Field(default=None, description="of what is trained in the row, for the base")
    tuned_log_probability: float | None = Field(default=None, description="the same for the tuned model")
    base_rejected_log_probability: float | None = Field(
        default=None, description="of the rejected answer, for the base"
    )
    tuned_rejected_log_probability: float | None = Field(default=None, description="the same for the tuned model")


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
