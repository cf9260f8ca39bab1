"""What `tunery check` says of a task before any compute, and prints with --json.

docs/reference.md is generated from the descriptions here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunery.jsonl import JsonObject
from tunery.records.hosted_state import Estimate
from tunery.records.run_receipt import DataSection, RowsSection
from tunery.records.typed_record import Record

VERSION = 1
"""Raised when a field changes its meaning; new fields do not raise it."""

SampleSide = Literal["chosen", "rejected"]
"""Which answer of a pair."""


class LengthsSection(Record):
    """How long the rows are, in tokens."""

    all: int = Field(description="tokens of the training rows")
    shortest: int = Field(description="tokens of the shortest row")
    median: float = Field(description="tokens of the median row")
    mean: float = Field(description="tokens of a row on average")
    longest: int = Field(description="tokens of the longest row")
    histogram: list[dict[str, int]] = Field(description="rows that have from … to … tokens, both included")


class TrainedLengthsSection(LengthsSection):
    """How long the rows are, and what of them is trained."""

    trained: int = Field(description="tokens with a loss")
    trained_share: float = Field(description="of all")
    end_of_turn_token: str | None = Field(default=None, description="that ends an answer")
    end_of_turn_trained: bool = Field(description="whether it is among the trained tokens")


class HostedLengthsSection(LengthsSection):
    """How long the rows are, as far as can be told from here."""

    exact: bool = Field(description="counted with the model's vocabulary, not estimated")


class PlannedTrainingSection(Record):
    """The training that the task describes, with an estimate of memory and time."""

    model: str = Field(description="as the task names it")
    parameters: int = Field(description="of the base")
    layers: int = Field(description="that are adapted")
    trainable_parameters: int = Field(description="of the adapter")
    steps: int = Field(description="optimizer steps")
    batch_size: int = Field(description="units per step")
    unit: str = Field(description="what a batch counts: row or pair")
    learning_rate: float = Field(description="peak")
    precision: str = Field(description="dtype that the base computes in")
    quantization: str | None = Field(default=None, description="how the base is held: nf4, int8, or null")
    device: str = Field(description="cpu, cuda or mps")
    computed_share: float = Field(description="tokens left to compute where rows share their beginning")
    memory_bytes: int = Field(description="estimated peak")
    available_bytes: int = Field(description="free now")
    flops: float = Field(description="floating-point operations of training")
    seconds: float = Field(description="estimated, of the training steps; validation and evaluation come on top")
    seconds_low: float = Field(description="the least that is likely")
    seconds_high: float = Field(description="the most that is likely, on a machine as busy as now")
    seconds_basis: str = Field(description="what the estimate was told from, in words")


class PlannedJobSection(Record):
    """The job that would be made on a server."""

    model: str = Field(description="as the server names it")
    address: str = Field(description="of the server")
    method: JsonObject = Field(description="as it is sent: type and hyperparameters")
    estimate: Estimate
    sentences: list[str] = Field(description="the estimate for a person, a line each")


class CheckReportBase(Record):
    """What every check says.

    The samples are shown by four lists that go together. Of a pair of answers both rows are there, the chosen one
    first.
    """

    version: int = Field(default=VERSION, description="of this format")
    name: str = Field(description="of the run")
    notes: list[str] = Field(description="what was decided while the rows were read")
    labels: dict[str, dict[str, int]] = Field(description="of a classification: label → split → rows")
    remarks: list[str] = Field(description="what to know before training")
    samples: list[list[tuple[str, bool]]] = Field(description="rows as pieces: a text, and whether it is trained")
    sample_names: list[str] = Field(description="where each stands, for a person")
    sample_sides: list[SampleSide | None] = Field(description="which answer of a pair each is; null without pairs")
    sample_lines: list[int] = Field(description="line of each in its file")


class CheckReport(CheckReportBase):
    """Of a run that would be trained here."""

    data: DataSection
    tokens: TrainedLengthsSection
    training: PlannedTrainingSection


class HostedCheckReport(CheckReportBase):
    """Of a run that would be trained on a server elsewhere."""

    data: RowsSection
    tokens: HostedLengthsSection
    hosted: PlannedJobSection


AnyCheckReport = CheckReport | HostedCheckReport
