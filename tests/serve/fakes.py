"""Stand-ins with the methods that the routes call: everything in memory, and jobs that advance when looked at."""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunery.serve.api_errors import ApiError, not_found
from tunery.serve.schemas import CreateJob


def new_id(prefix: str, length: int = 24) -> str:
    return prefix + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))


@dataclass(frozen=True)
class Page:
    data: list[Any]
    has_more: bool


def page(items: Sequence[Any], after: str | None, limit: int) -> Page:
    """The items behind `after`."""
    ids = [item.id for item in items]
    if after is not None and after not in ids:
        raise ApiError(400, f"after: there is nothing with the id {after}", param="after")
    start = ids.index(after) + 1 if after else 0
    return Page(list(items[start : start + limit]), start + limit < len(items))


# --------------------------------------------------------------------------- files


@dataclass(frozen=True)
class File:
    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None
    status: str = "processed"
    status_details: str | None = None


class FakeFiles:
    def __init__(self, folder: Path, max_bytes: int = 1 << 29):
        self.folder, self.max_bytes, self.kept = folder, max_bytes, {}
        folder.mkdir(parents=True, exist_ok=True)

    def upload(self, stream: Any, filename: str, purpose: str, expires: int | None = None) -> File:
        if purpose != "fine-tune":
            raise ApiError(400, f"{purpose!r} is not a purpose here", code="invalid_value", param="purpose")
        content = stream.read()
        if len(content) > self.max_bytes:
            raise ApiError(413, "the file is too large", code="file_too_large", param="file")
        now = int(time.time())
        file = File(new_id("file-"), len(content), now, filename, purpose, None if expires is None else now + expires)
        self.kept[file.id] = file
        (self.folder / file.id).write_bytes(content)
        return file

    def get(self, file_id: str) -> File:
        if file_id not in self.kept:
            raise not_found("file", file_id)
        return self.kept[file_id]

    def list(self, purpose: str | None, limit: int, order: str, after: str | None) -> Page:
        files = [file for file in self.kept.values() if purpose in (None, file.purpose)]
        return page(files[::-1] if order == "desc" else files, after, limit)

    def delete(self, file_id: str) -> None:
        self.get(file_id)
        del self.kept[file_id]

    def content(self, file_id: str) -> Path:
        return self.folder / self.get(file_id).id


# --------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Served:
    id: str
    base: str
    adapter: Path | None = None
    key: str = ""
    created: int = 1_700_000_000
    owned_by: str = "tunery"


class FakeRegistry:
    def __init__(self, bases: Sequence[str], aliases: dict[str, str]):
        self.models = {name: Served(name, aliases.get(name, name)) for name in (*bases, *aliases)}

    def resolve(self, name: str) -> Served:
        base = name.partition(":ckpt-step-")[0]
        if base not in self.models:
            raise ApiError(404, f"there is no model {name!r}", code="model_not_found", param="model")
        return replace(self.models[base], id=name)

    def list(self) -> list[Served]:
        return list(self.models.values())

    def base_of(self, name: str) -> tuple[str, Path | None]:
        model = self.resolve(name)
        return model.base, model.adapter

    def delete(self, name: str) -> None:
        if self.resolve(name).adapter is None:
            raise ApiError(403, f"{name} is a base of this server", code="cannot_delete_model")
        del self.models[name]


# --------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    id: str
    created_at: int
    model: str
    seed: int
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    status: str = "validating_files"
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = None
    organization_id: str = "local"
    error: dict[str, Any] | None = None
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    trained_tokens: int | None = None
    result_files: list[str] = field(default_factory=list)
    user_provided_suffix: str | None = None


@dataclass(frozen=True)
class Event:
    id: str
    created_at: int
    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


_NEXT = {"validating_files": "queued", "queued": "running", "running": "succeeded"}


class FakeJobs:
    """Each look at a job moves it on; a file with the word "broken" in it fails the job."""

    def __init__(self, files: FakeFiles, registry: FakeRegistry, folder: Path):
        self.files, self.registry, self.folder = files, registry, folder
        self.jobs: dict[str, Job] = {}
        self.started = self.stopped = False
        self._events: dict[str, list[Event]] = {}

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.stopped = True

    def create(self, request: CreateJob) -> Job:
        self.registry.base_of(request.model)
        for param in ("training_file", "validation_file"):
            name = getattr(request, param)
            if name and name not in self.files.kept:
                raise ApiError(400, f"{param}: there is no file {name!r}", code="file_not_found", param=param)
        asked = request.hyperparameters.model_dump()
        shown = asked if request.kind == "dpo" else {key: asked[key] for key in asked if key != "beta"}
        job = Job(
            id=new_id("ftjob-"),
            created_at=int(time.time()),
            model=request.model,
            seed=7 if request.seed is None else request.seed,
            training_file=request.training_file,
            validation_file=request.validation_file,
            hyperparameters={key: asked[key] for key in asked if key != "beta"},
            method={"type": request.kind, request.kind: {"hyperparameters": shown}},
            metadata=request.metadata,
            integrations=[part.model_dump() for part in request.integrations or ()] or None,
            user_provided_suffix=request.suffix,
        )
        self.jobs[job.id] = job
        self._say(job.id, f"Created fine-tuning job: {job.id}")
        return job

    def _say(self, job_id: str, message: str, data: dict[str, Any] | None = None) -> None:
        event = Event(new_id("ftevent-"), int(time.time()), message, type="metrics" if data else "message", data=data)
        self._events.setdefault(job_id, []).insert(0, event)

    def _find(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise not_found("fine-tuning job", job_id)
        return self.jobs[job_id]

    def get(self, job_id: str) -> Job:
        job = self._find(job_id)
        if job.status in _NEXT:
            self.jobs[job_id] = self._advanced(job)
        return self.jobs[job_id]

    def _advanced(self, job: Job) -> Job:
        if job.status == "validating_files" and b"broken" in self.files.content(job.training_file).read_bytes():
            self._say(job.id, "The job failed")
            error = {
                "code": "invalid_training_file",
                "param": "training_file",
                "message": "Example 1, message 1: the role is missing",
            }
            return replace(job, status="failed", error=error, finished_at=int(time.time()))
        after = replace(job, status=_NEXT[job.status])
        self._say(job.id, f"The job is {after.status}")
        return self._finished(after) if after.status == "succeeded" else after

    def _finished(self, job: Job) -> Job:
        for step in range(1, 4):
            data = {"step": step, "total_steps": 3, "train_loss": 1 / step, "train_mean_token_accuracy": 0.5}
            self._say(job.id, f"Step {step}/3: training loss={1 / step:.2f}", data)
        name = f"ft:{job.model}:local:{job.user_provided_suffix or ''}:{new_id('', 8)}"
        adapter = self.run_dir(job.id) / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").write_bytes(b"weights")
        self.registry.models[name] = Served(name, self.registry.resolve(job.model).base, adapter, job.id)
        result = self.files.folder / "result"
        result.write_bytes(b"step,train_loss\n1,0.5\n")
        file = File(new_id("file-"), result.stat().st_size, int(time.time()), "step_metrics.csv", "fine-tune-results")
        result.rename(self.files.folder / file.id)
        self.files.kept[file.id] = file
        return replace(
            job, fine_tuned_model=name, finished_at=int(time.time()), trained_tokens=123, result_files=[file.id]
        )

    def list(self, after: str | None, limit: int, metadata: dict[str, str] | None = None) -> Page:
        jobs = [job for job in list(self.jobs.values())[::-1] if _matches(job.metadata, metadata)]
        return page(jobs, after, limit)

    def cancel(self, job_id: str) -> Job:
        return self._set(job_id, "cancelled", ("validating_files", "queued", "running", "paused"))

    def pause(self, job_id: str) -> Job:
        return self._set(job_id, "paused", ("validating_files", "queued", "running"))

    def resume(self, job_id: str) -> Job:
        return self._set(job_id, "queued", ("paused",))

    def _set(self, job_id: str, status: str, before: tuple[str, ...]) -> Job:
        job = self._find(job_id)
        if job.status not in before:
            raise ApiError(400, f"the job {job_id} is {job.status}", code="invalid_job_status", param="id")
        self.jobs[job_id] = replace(job, status=status)
        return self.jobs[job_id]

    def events(self, job_id: str, after: str | None, limit: int) -> Page:
        self._find(job_id)
        return page(self._events[job_id], after, limit)

    def checkpoints(self, job_id: str, after: str | None, limit: int) -> Page:
        name = self._find(job_id).fine_tuned_model
        steps = (3, 2, 1) if name else ()
        found = [
            Checkpoint(
                f"ftckpt_{job_id[6:-1]}{step}", 1, f"{name}:ckpt-step-{step}", job_id, step, {"train_loss": 1 / step}
            )
            for step in steps
        ]
        return page(found, after, limit)

    def run_dir(self, job_id: str) -> Path:
        return self.folder / self._find(job_id).id / "run"


def _matches(metadata: dict[str, str] | None, wanted: dict[str, str] | None) -> bool:
    return all((metadata or {}).get(key) == value for key, value in (wanted or {}).items())
