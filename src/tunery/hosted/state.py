"""Where a hosted run stands: what was sent, under which names it lies there, and which job trains on it.

Kept in hosted.json in the run directory and written after each step, so that the same command goes on from there. It
never holds a key.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tunery.errors import CheckpointError, ConfigError
from tunery.paths import RunPaths, read_json, write_json

DONE = ("succeeded", "failed", "cancelled")
"""Statuses in which a job stays."""


@dataclass
class HostedState:
    """See the module.

    Attributes:
        address: of the server.
        model: trained there, as the server calls it.
        method, seed, suffix: of the job, as asked for.
        files: name ("training", "validation") → SHA-256 of the file to send.
        uploaded: name → {id, bytes} of those that were sent.
        estimate: what was agreed to (tunery.hosted.estimate).
        job: as the server last described it; empty before it was made.
        earlier: jobs of this run that failed or were cancelled.
    """

    address: str
    model: str
    method: dict[str, Any]
    seed: int
    suffix: str
    files: dict[str, str]
    uploaded: dict[str, dict[str, Any]] = field(default_factory=dict)
    estimate: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    earlier: list[dict[str, Any]] = field(default_factory=list)

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
        """Write it down, whole or not at all."""
        write_json(state_path(paths), asdict(self))

    def differences(self, now: HostedState) -> list[str]:
        """What `now` asks for in another way, each in words."""
        return [
            f"the {name} rows" if key == "files" else f"{key}: {then!r} → {new!r}"
            for key in ("address", "model", "method", "seed", "suffix", "files")
            for name, then, new in _pairs(key, getattr(self, key), getattr(now, key))
            if then != new
        ]


def _pairs(key: str, then: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if key != "files":
        return [(key, then, now)]
    return [(name, then.get(name), now.get(name)) for name in sorted({*then, *now})]


def state_path(paths: RunPaths) -> Path:
    """hosted.json."""
    return paths.root / "hosted.json"


def events_path(paths: RunPaths) -> Path:
    """events.jsonl: what the server said of the job."""
    return paths.root / "events.jsonl"


def results_path(paths: RunPaths) -> Path:
    """results.csv: the job's metrics as the server keeps them."""
    return paths.root / "results.csv"


def put_aside(paths: RunPaths) -> None:
    """Move what is known of an earlier job to a folder earlier-N."""
    left = [path for path in (paths.metrics, events_path(paths), results_path(paths)) if path.exists()]
    number = 1
    while (kept := paths.root / f"earlier-{number}").exists():
        number += 1
    for path in left:
        kept.mkdir(exist_ok=True)
        path.rename(kept / path.name)


def require_local(paths: RunPaths) -> None:
    """Refuse to train here in the folder of a hosted run.

    Raises:
        ConfigError: it is one.
    """
    if state_path(paths).exists():
        raise ConfigError(
            f"{paths.root} holds a run that is trained elsewhere",
            "give this run its own name with --set name=NAME, or start over with --resume never (the earlier run is "
            "kept under another name)",
        )


def load_state(paths: RunPaths) -> HostedState | None:
    """What is written down; None for a run that has not begun.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = state_path(paths)
    try:
        values = read_json(path)
        known = {one.name for one in fields(HostedState)}
        return HostedState(**{key: value for key, value in values.items() if key in known})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            "it names the job of this run: restore it, or name the job with --resume ftjob-… (the server lists it), or "
            "start over with --resume never (the job itself goes on)",
        ) from None
