"""Answers that are objects with an id: files, jobs, events, checkpoints, models; and lists of them.

Each is read from the store's plain dataclass of the same fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tunery.jsonl import JsonObject


class WireObject(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(from_attributes=True)

    def json_bytes(self) -> bytes:
        """The body. Keys that were never set are left out; a null that was set is sent."""
        return self.model_dump_json(exclude_unset=True).encode()


class FileObject(WireObject):
    """An uploaded file, or the result file of a job."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class JobErrorObject(WireObject):
    """Why a job failed; all null in a job that did not."""

    code: str
    message: str
    param: str | None = None


class JobObject(WireObject):
    """A fine-tuning job.

    `status` may be "paused" while the job is paused, as in the reference's example; the official client's types do not
    list it, so a client with strict validation of answers cannot read a paused job.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    hyperparameters: dict[str, int | float | str]
    method: JsonObject
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobErrorObject | None
    seed: int
    estimated_finish: int | None = None
    integrations: list[JsonObject] | None = None
    metadata: dict[str, str] | None = None
    user_provided_suffix: str | None = None


class EventObject(WireObject):
    """Something that happened in a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: JsonObject | None = None


class CheckpointObject(WireObject):
    """A model as it was at a step of a job; it answers under its own name."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class ModelObject(WireObject):
    """A model that answers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


def one(kind: type[WireObject], value: object) -> JsonObject:
    """The JSON of an object of the store."""
    return kind.model_validate(value).model_dump(mode="json")


def listed(kind: type[WireObject], values: Iterable[object], has_more: bool) -> JsonObject:
    """The JSON of a page of a list, with the ids that the next page follows from."""
    data = [one(kind, value) for value in values]
    ids = [entry["id"] for entry in data]
    return {
        "object": "list",
        "data": data,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": has_more,
    }


def deleted(kind: str, name: str) -> JsonObject:
    """The JSON that says an object is gone."""
    return {"id": name, "object": kind, "deleted": True}
