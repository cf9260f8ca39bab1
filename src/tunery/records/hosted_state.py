"""hosted.json: where a hosted run stands. What was sent, under which names it lies there, and which job trains on it.

Written after each step, so that the same command continues from there. It never holds a key.
"""

from __future__ import annotations

from pydantic import Field

from tunery.jsonl import JsonObject
from tunery.paths import RunPaths, write_json
from tunery.records.typed_record import Record

VERSION = 1
"""Raised when a field changes its meaning; new fields do not raise it."""


class AnswerEstimate(Record):
    """Questions to one model."""

    model: str = Field(description="that is asked")
    questions: int = Field(description="still to be asked")
    asked: int = Field(description="tokens of the questions")
    answered: int = Field(description="tokens of answers as long as those in the data")
    cost: float | None = Field(description="in US dollars, if known")


class Estimate(Record):
    """Tokens and cost of a job and of its evaluation."""

    exact: bool = Field(description="tokens are counted with the model's vocabulary, not estimated")
    rows: int = Field(description="of the training file")
    validation_rows: int = Field(description="of the validation file")
    training_tokens: int = Field(description="that the job is billed for")
    training_cost: float | None = Field(description="in US dollars, if known")
    answers: list[AnswerEstimate] = Field(description="what the evaluation asks of each side")
    cost: float | None = Field(description="of everything, if all of it is known")
    currency: str = Field(description="USD")
    prices: str = Field(description="where they come from, in words")


class UploadedFile(Record):
    """A file on the server."""

    id: str = Field(description="its name there")
    bytes: int | None = Field(description="its size there, where the server says")


class HostedState(Record):
    """The content of hosted.json."""

    version: int = Field(default=VERSION, description="of this format")
    address: str = Field(description="of the server")
    model: str = Field(description="trained there, as the server names it")
    method: JsonObject = Field(description="of the job, as asked for")
    seed: int = Field(description="of the job, as asked for")
    suffix: str = Field(description="of the tuned model's name, as asked for")
    files: dict[str, str] = Field(description="training, validation → SHA-256 of the file to send")
    uploaded: dict[str, UploadedFile] = Field(default_factory=dict, description="those that were sent")
    estimate: JsonObject = Field(default_factory=dict, description="the estimate that was agreed to; {} before")
    job: JsonObject = Field(default_factory=dict, description="as the server last described it; {} before it was made")
    earlier: list[JsonObject] = Field(default_factory=list, description="jobs that failed or were cancelled")

    @property
    def job_id(self) -> str | None:
        """The job, once there is one."""
        return self.job.get("id")

    @property
    def status(self) -> str | None:
        """Of the job, as last seen."""
        return self.job.get("status")

    @property
    def tuned_model(self) -> str | None:
        """The name by which the tuned model answers, once the job has succeeded."""
        return self.job.get("fine_tuned_model")

    def save(self, paths: RunPaths) -> None:
        """Write it down, atomically."""
        write_json(paths.hosted_state, self.model_dump(mode="json"))

    def differences(self, now: HostedState) -> list[str]:
        """What `now` asks for in another way, each in words."""
        names = ("address", "model", "method", "seed", "suffix")
        changed = [(name, self[name], now[name]) for name in names]
        rows = [name for name in sorted({*self.files, *now.files}) if self.files.get(name) != now.files.get(name)]
        return [f"{name}: {then!r} → {new!r}" for name, then, new in changed if then != new] + [
            f"the {name} rows" for name in rows
        ]
