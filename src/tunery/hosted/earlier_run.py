"""A run that was begun earlier: read, set aside, or recovered by the name of its job where hosted.json was lost."""

from __future__ import annotations

import hashlib
import re

from tunery.errors import CheckpointError, ConfigError
from tunery.hosted.client import Service
from tunery.hosted.hosted_plan import HostedPlan
from tunery.hosted.job import content, retrieve
from tunery.hosted.job_settings import to_yaml
from tunery.paths import RunPaths, write_atomic
from tunery.records.hosted_state import HostedState, UploadedFile
from tunery.records.typed_record import RecordError

FILES = ("training", "validation")


def put_aside(paths: RunPaths) -> None:
    """Move what is known of an earlier job to a folder earlier-N."""
    left = [path for path in (paths.metrics, paths.events, paths.results) if path.exists()]
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
    if paths.hosted_state.exists():
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
    try:
        return HostedState.read(paths.hosted_state)
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise CheckpointError(
            f"{paths.hosted_state} cannot be read: {error}",
            "it names the job of this run: restore it, or name the job with --resume ftjob-… (the server lists it), or "
            "start over with --resume never (the job itself continues)",
        ) from None


# --------------------------------------------------------------------------- recovered by the name of its job


def is_job(resume: str) -> bool:
    """Whether what is to be resumed is a job on a server."""
    return resume.startswith("ftjob-")


def recover(service: Service, plan: HostedPlan, paths: RunPaths, job_id: str) -> HostedState:
    """The state of the run that made this job, written down anew unless it is there.

    Raises:
        ConfigError: the folder holds another run, or the job was made with another model or other rows.
        TuneryError: the job or its rows cannot be had.
    """
    try:
        then = load_state(paths)
    except CheckpointError:
        then = None
    if then is not None and then.job_id == job_id:
        return then
    if then is not None or paths.checkpoints.exists():
        raise ConfigError(
            f"{paths.root} holds another run than that of {job_id}", "give this run its own name with --set name=NAME"
        )
    state = _state_of(service, plan, job_id)
    if not paths.receipt.exists():
        put_aside(paths)  # whichever job they are of: those of this one are fetched anew
    write_atomic(paths.task, to_yaml(plan.task))
    state.save(paths)
    return state


def _state_of(service: Service, plan: HostedPlan, job_id: str) -> HostedState:
    state, job = plan.state(), retrieve(service, job_id)
    different = [] if _is_model(job["model"], plan.model) else [f"the model: {job['model']}, not {plan.model}"]
    for name in FILES:
        file = job.get(f"{name}_file")
        sent = content(service, str(file)) if file else b""
        if (hashlib.sha256(sent).hexdigest() if file else None) != state.files.get(name):
            different.append(f"the {name} rows")
        if file:
            state.uploaded[name] = UploadedFile(id=str(file), bytes=len(sent))
    if different:
        raise ConfigError(
            f"{job_id} was not made for this task, but for others in: {'; '.join(different)}",
            "give the task file, and the rows, that it was made with",
        )
    state.job = job
    return state


def _is_model(there: str, asked: str) -> bool:
    """Whether a server calls by one name, which may have a date, what was asked for by another."""
    return re.fullmatch(rf"{re.escape(asked)}(-\d{{4}}-\d{{2}}-\d{{2}})?", there) is not None
