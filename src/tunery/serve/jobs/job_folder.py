"""Where the files of one job lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunery.jsonl import JsonObject
from tunery.paths import RunPaths, read_json, write_json


@dataclass(frozen=True)
class JobFolder:
    """The folder of a job: what it was asked for, its own links to its data, its run, and what its workers say.

    The server writes `request`; the worker writes `task`, `facts`, `status`, `error` and the run.
    """

    root: Path

    @classmethod
    def of(cls, jobs: Path, job_id: str) -> JobFolder:
        """The folder of a job whose id the store knows."""
        return cls(jobs / job_id)

    @property
    def request(self) -> Path:
        """JSON of tunery.serve.jobs.translate.JobSpec."""
        return self.root / "job.json"

    def data(self, param: str) -> Path:
        """The job's link to its "training_file" or "validation_file"."""
        return self.root / {"training_file": "train.jsonl", "validation_file": "validation.jsonl"}[param]

    @property
    def start(self) -> Path:
        """A copy of the adapter to start from, where the job has one."""
        return self.root / "start"

    @property
    def task(self) -> Path:
        """The task, made when the files have been found good."""
        return self.root / "task.yaml"

    @property
    def facts(self) -> Path:
        """JSON of tunery.serve.jobs.validate.Facts."""
        return self.root / "validated.json"

    @property
    def status(self) -> Path:
        """What the worker says while it trains: JSON lines (tunery.serve.jobs.worker)."""
        return self.root / "status.jsonl"

    @property
    def error(self) -> Path:
        """Why the last worker gave up: {"code", "message", "param"}."""
        return self.root / "error.json"

    @property
    def log(self) -> Path:
        """What the workers printed."""
        return self.root / "worker.log"

    @property
    def lock(self) -> Path:
        """Held by a worker as long as it lives."""
        return self.root / "worker.lock"

    @property
    def run(self) -> RunPaths:
        """The run directory."""
        return RunPaths(self.root / "run")

    @property
    def checkpoints(self) -> Path:
        """Adapter folders made of checkpoints."""
        return self.root / "checkpoints"

    def exported(self, step: int) -> Path:
        """The adapter folder of one checkpoint."""
        return self.checkpoints / f"step-{step}"


def read_error(folder: JobFolder) -> JsonObject | None:
    """The content of error.json; None if there is none that can be read."""
    try:
        found = read_json(folder.error)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("message"), str) else None


def write_error(folder: JobFolder, code: str, message: str, param: str | None) -> None:
    """Say why the worker gives up."""
    write_json(folder.error, {"code": code, "message": message, "param": param})
