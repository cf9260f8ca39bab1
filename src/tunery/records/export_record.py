"""export.json: what was exported, from which run, and how far it is from the adapter."""

from __future__ import annotations

from pydantic import Field

from tunery.records.typed_record import Record

VERSION = 1


class ExportedBase(Record):
    """The base of the run."""

    name: str = Field(description="as the task names it")
    sha256: str = Field(description="of its weights")
    license: str | None = Field(default=None, description="as the model names it")


class ComparedRows(Record):
    """The rows that the export and the adapter were compared on."""

    origin: str = Field(description="held-out, or else where they come from")
    count: int = Field(description="of the rows")


class TokenDifference(Record):
    """Between the log-probabilities of the export and of the adapter, in nats."""

    positions: int = Field(description="answer tokens compared")
    mean_difference: float = Field(description="mean of the absolute differences")
    max_difference: float = Field(description="the largest of them")
    kl: float = Field(description="mean KL(tuned ‖ exported)")
    kl_max: float | None = Field(default=None, description="the largest of them")
    same_choice: float = Field(description="share of tokens with the same first choice")
    agreement: float = Field(description="the same, near ties counted")


class KeptUpdate(Record):
    """How much of the adapter's update is in the export."""

    layers: int = Field(description="looked at")
    measured: int = Field(description="those whose update is larger than rounding")
    mean_share: float | None = Field(default=None, description="of the update, mean of the measured layers")
    least_share: float | None = Field(default=None, description="of the update, least of the measured layers")
    least_in: str | None = Field(default=None, description="the layer with the least")


class ExportComparison(Record):
    """The export loaded back, against the adapter."""

    runtime: str = Field(description="program that loaded it, and its version")
    difference: TokenDifference
    limits: dict[str, float] = Field(description="of the differences, by their names")
    identical_prompts: int = Field(description="conversations that give the same tokens")
    identical_texts: int = Field(description="texts that give the same tokens")
    update: KeptUpdate


class ExportedFile(Record):
    """A file of the export."""

    bytes: int = Field(description="its size")
    sha256: str = Field(description="of its bytes")


class ExportRecord(Record):
    """Of one export."""

    version: int = Field(default=VERSION, description="of this format")
    tunery: str = Field(description="version that exported")
    created: str = Field(description="time, UTC")
    run: str = Field(description="name of the run")
    format: str = Field(description="the target: peft, merged, gguf, …")
    numbers: str = Field(description="dtype of the weights")
    base: ExportedBase
    adapter_sha256: str = Field(description="of the run's adapter")
    template_sha256: str = Field(description="of the chat template")
    rows: ComparedRows
    comparison: ExportComparison
    notes: list[str] = Field(description="what to know about it")
    files: dict[str, ExportedFile] = Field(description="file → bytes and sha256")
