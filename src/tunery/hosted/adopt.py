"""A run whose hosted.json was lost, taken up again by the name of its job."""

from __future__ import annotations

import hashlib
import re

from tunery.errors import CheckpointError, ConfigError
from tunery.hosted.client import Service
from tunery.hosted.hosted_plan import HostedPlan
from tunery.hosted.job import content, retrieve
from tunery.hosted.job_settings import to_yaml
from tunery.hosted.state import HostedState, load_state, put_aside
from tunery.paths import RunPaths, write_atomic

FILES = ("training", "validation")


def is_job(resume: str) -> bool:
    """Whether what is to be gone on from is a job on a server."""
    return resume.startswith("ftjob-")


def adopt(service: Service, plan: HostedPlan, paths: RunPaths, job_id: str) -> HostedState:
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
            state.uploaded[name] = {"id": str(file), "bytes": len(sent)}
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
