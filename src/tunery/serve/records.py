"""What the server keeps: one dataclass a kind of record, their ids, and the arrows between a job's statuses."""

from __future__ import annotations

import hashlib
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tunery.jsonl import JsonObject

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]

FINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})

TRANSITIONS: Mapping[str, frozenset[str]] = {
    "validating_files": frozenset({"queued", "paused", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),  # queued: its worker is gone
    "paused": frozenset({"validating_files", "queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""Status → what may follow it."""

_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH = 24


def new_id(prefix: str, length: int = _ID_LENGTH) -> str:
    """`prefix` and random letters and digits: nobody can guess it, and it is safe as a file name."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


def derived_id(prefix: str, *parts: object) -> str:
    """As `new_id`, but the same for the same parts: what is noted twice under it is kept once."""
    number = int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest())
    letters = []
    for _ in range(_ID_LENGTH):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return prefix + "".join(letters)


# --------------------------------------------------------------------------- records

# Times are Unix time in whole seconds. The first four hold OpenAI's fields, and no others.


@dataclass(frozen=True)
class File:
    """An uploaded file, or a result."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str = "processed"
    expires_at: int | None = None
    status_details: str | None = None
    object: str = "file"


@dataclass(frozen=True)
class JobError:
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Job:
    """A fine-tuning job."""

    id: str
    created_at: int
    model: str
    seed: int
    training_file: str
    validation_file: str | None = None
    status: JobStatus = "validating_files"
    hyperparameters: dict[str, int | float | str] = field(default_factory=dict)
    method: JsonObject = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    integrations: list[JsonObject] | None = None
    organization_id: str = "local"
    error: JobError | None = None
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    trained_tokens: int | None = None
    result_files: list[str] = field(default_factory=list)
    user_provided_suffix: str | None = None
    object: str = "fine_tuning.job"


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; its owner in the store is the job."""

    id: str
    created_at: int
    message: str
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics"] = "message"
    data: JsonObject | None = None
    object: str = "fine_tuning.job.event"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that answers as a model; its owner in the store is the job."""

    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float] = field(default_factory=dict)
    object: str = "fine_tuning.job.checkpoint"


@dataclass(frozen=True)
class Model:
    """A fine-tuned model: `id` is its name, its owner in the store is the job. `base` is what Task.model names."""

    id: str
    base: str
    created: int


@dataclass(frozen=True)
class Digest:
    """The SHA-256 of a file's bytes, under the file's id."""

    id: str
    sha256: str


@dataclass(frozen=True)
class Work:
    """What the server needs to know of a job beyond what it shows; `id` is the job's.

    Attributes:
        base: what Task.model names.
        name: the fine-tuned model's name, once there is one.
        wanted: "pause" from when that is asked for until the worker has ended.
        validated: its files are known to be good.
        crashes: how often in a row its worker has died without a new checkpoint.
        crash_step: the last checkpoint at the latest of these deaths.
    """

    id: str
    base: str
    name: str
    wanted: Literal["pause"] | None = None
    validated: bool = False
    crashes: int = 0
    crash_step: int = -1
