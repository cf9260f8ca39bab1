"""/v1/fine_tuning/jobs: training, as jobs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from tunery.serve.records import Job
from tunery.serve.responses import json_response
from tunery.serve.routes.body import json_body, metadata_filter, require_id
from tunery.serve.routes.services import Injected, Services
from tunery.serve.schemas import CreateJob
from tunery.serve.schemas.objects import CheckpointObject, EventObject, JobObject, listed, one

router = APIRouter(prefix="/v1/fine_tuning/jobs")

Limit = Annotated[int, Query(ge=1, le=1000)]

_JOB = "fine-tuning job"


@router.post("")
async def create(asked: Annotated[CreateJob, Depends(json_body(CreateJob))], services: Injected) -> Response:
    """Create a job; its files are checked when its turn comes."""
    return json_response(one(JobObject, await run_in_threadpool(services.jobs.create, asked)))


@router.get("")
def list_jobs(request: Request, services: Injected, after: str | None = None, limit: Limit = 20) -> Response:
    """A page of the jobs, newest first."""
    wanted = metadata_filter(request)
    if wanted == "null":
        return json_response(listed(JobObject, *_without_metadata(services, after, limit)))
    page = services.jobs.list(after=after, limit=limit, metadata=wanted)
    return json_response(listed(JobObject, page.data, page.has_more))


def _without_metadata(services: Services, after: str | None, limit: int) -> tuple[list[Job], bool]:
    """(jobs that have no metadata, whether there are more)."""
    found: list[Job] = []
    while True:
        page = services.jobs.list(after=after, limit=100)
        found += [job for job in page.data if not job.metadata]
        if len(found) > limit or not page.has_more:
            return found[:limit], len(found) > limit
        after = page.data[-1].id


@router.get("/{job_id}")
def retrieve(job_id: str, services: Injected) -> Response:
    """A job as it is now."""
    return json_response(one(JobObject, services.jobs.get(require_id(_JOB, job_id))))


@router.post("/{job_id}/cancel")
def cancel(job_id: str, services: Injected) -> Response:
    """Stop a job for good."""
    return json_response(one(JobObject, services.jobs.cancel(require_id(_JOB, job_id))))


@router.post("/{job_id}/pause")
def pause(job_id: str, services: Injected) -> Response:
    """Let a job write a checkpoint and free the machine."""
    return json_response(one(JobObject, services.jobs.pause(require_id(_JOB, job_id))))


@router.post("/{job_id}/resume")
def resume(job_id: str, services: Injected) -> Response:
    """Let a paused job resume from its checkpoint."""
    return json_response(one(JobObject, services.jobs.resume(require_id(_JOB, job_id))))


@router.get("/{job_id}/events")
def events(job_id: str, services: Injected, after: str | None = None, limit: Limit = 20) -> Response:
    """A page of what happened in a job, newest first."""
    page = services.jobs.events(require_id(_JOB, job_id), after=after, limit=limit)
    return json_response(listed(EventObject, page.data, page.has_more))


@router.get("/{job_id}/checkpoints")
def checkpoints(job_id: str, services: Injected, after: str | None = None, limit: Limit = 10) -> Response:
    """A page of a job's checkpoints, newest first."""
    page = services.jobs.checkpoints(require_id(_JOB, job_id), after=after, limit=limit)
    return json_response(listed(CheckpointObject, page.data, page.has_more))
