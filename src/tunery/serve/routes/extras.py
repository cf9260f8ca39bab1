"""/api: what the page needs beyond OpenAI's API. And /health."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Annotated, Literal

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response, StreamingResponse

import tunery
from tunery.jsonl import JsonObject
from tunery.openai_api.methods import METHODS
from tunery.paths import RunPaths, safe_name
from tunery.serve.api_errors import ApiError
from tunery.serve.jobs.translate import Use
from tunery.serve.registry import ServedModel
from tunery.serve.responses import json_response
from tunery.serve.routes.body import require_id
from tunery.serve.routes.services import Injected, Services
from tunery.training.metrics import read_metrics

router = APIRouter()

MOST_LINES = 2000
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_JOB = "fine-tuning job"
_CHUNK = 1 << 20


@router.get("/health")
def health() -> Response:
    """Whether the server answers; needs no key and says nothing else."""
    return json_response({"status": "ok"})


@router.get("/favicon.ico")
def no_favicon() -> Response:
    """The page has its own icon; browsers ask for this one all the same."""
    return Response(status_code=204)


@router.get("/api/server")
def server(services: Injected) -> Response:
    """What this server is, and how busy."""
    settings = services.settings
    return json_response(
        {
            "version": tunery.__version__,
            "bases": list(settings.bases),
            "aliases": dict(settings.aliases),
            "default_model": settings.bases[0],
            "limits": {
                "upload_bytes": settings.upload_limit,
                "json_bytes": settings.json_limit,
                "rows": settings.max_rows,
                "queue": settings.max_queue,
                "slots": settings.slots,
            },
            "engine": services.backend.health(),
            "needs_key": bool(settings.api_keys),
        }
    )


@router.get("/api/models")
def models(services: Injected) -> Response:
    """The models with what /v1/models has no place for."""
    return json_response({"data": [_model(services, model) for model in services.registry.list()]})


def _model(services: Services, model: ServedModel) -> JsonObject:
    kind = "fine-tuned" if model.adapter else "alias" if model.id in services.settings.aliases else "base"
    return {
        "id": model.id,
        "kind": kind,
        "base": model.base,
        "job": model.key if model.key.startswith("ftjob-") else None,
        "created": model.created,
        "bytes": _adapter_bytes(model.adapter) if model.adapter else None,
    }


def _adapter_bytes(folder: Path) -> int | None:
    try:
        return (folder / "adapter_model.safetensors").stat().st_size
    except OSError:
        return None


# --------------------------------------------------------------------------- before a job


@router.post("/api/files/{file_id}/check")
async def check(
    file_id: str,
    services: Injected,
    model: str,
    method: Literal["supervised", "dpo"] = "supervised",
    n_epochs: Annotated[int | None, Query(ge=1, le=50)] = None,
    batch_size: Annotated[int | None, Query(ge=1, le=256)] = None,
    learning_rate_multiplier: Annotated[float | None, Query(gt=0)] = None,
    beta: Annotated[float | None, Query(gt=0, le=2)] = None,
    use: Use = "training",
) -> Response:
    """Look at a file as a job would, one file at a time; nothing is trained."""
    given = {
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": learning_rate_multiplier,
        "beta": beta,
    }
    asked = {name: given[name] for name in METHODS[method].hyperparameters if given[name] is not None}
    async with services.one_look:
        return json_response(
            await run_in_threadpool(_look, services, require_id("file", file_id), model, method, asked, use)
        )


def _look(services: Services, file_id: str, model: str, method: str, asked: dict[str, float], use: Use) -> JsonObject:
    from tunery.serve.look import look  # brings what training needs

    base, start = services.registry.base_of(model)
    settings = services.settings
    return look(services.files, file_id, base, start, method, asked, settings.task_defaults, settings.home, use)


# --------------------------------------------------------------------------- of a job


@router.get("/api/jobs/{job_id}/metrics")
def metrics(job_id: str, services: Injected, after: Annotated[int, Query(ge=0)] = 0) -> Response:
    """The lines of metrics.jsonl of later steps than `after`, thinned to about 2,000."""
    paths = _run(services, job_id)
    lines = [line for line in read_metrics(paths.metrics) if line.get("step", 0) > after]
    return json_response(
        {
            "lines": thin(lines, MOST_LINES),
            "total_steps": _total_steps(services, job_id),
            "report": paths.report.is_file(),
            "adapter_bytes": _adapter_bytes(paths.adapter),
        }
    )


def _run(services: Services, job_id: str) -> RunPaths:
    return RunPaths(services.jobs.run_dir(services.jobs.get(require_id(_JOB, job_id)).id))


def _total_steps(services: Services, job_id: str) -> int | None:
    """As the last metrics event says; None before the first."""
    events = services.jobs.events(job_id, after=None, limit=20).data
    return next((event.data["total_steps"] for event in events if event.type == "metrics" and event.data), None)


def thin(lines: list[JsonObject], most: int) -> list[JsonObject]:
    """Evenly spaced lines, the first and the last among them; all lines of validation are kept."""
    training = [index for index, line in enumerate(lines) if "valid_loss" not in line]
    if len(training) <= most:
        return lines
    spaced = {training[round(number * (len(training) - 1) / (most - 1))] for number in range(most)}
    return [line for index, line in enumerate(lines) if index in spaced or "valid_loss" in line]


@router.get("/api/jobs/{job_id}/report")
def report(job_id: str, services: Injected) -> Response:
    """The run's report: a page of its own, with its styles inside and no scripts."""
    path = _run(services, job_id).report
    if not path.is_file():
        raise ApiError(404, "This job has no report yet: it is written at the end.", code="not_ready")
    headers = {"content-security-policy": REPORT_POLICY}
    return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)


@router.get("/api/jobs/{job_id}/adapter.zip")
async def adapter(job_id: str, services: Injected) -> Response:
    """The adapter folder, in PEFT's format, as a ZIP file."""
    archive, size, name = await run_in_threadpool(_zip_adapter, services, job_id)
    headers = {
        "content-disposition": f'attachment; filename="{name}.zip"',
        "content-length": str(size),
    }
    return StreamingResponse(_pieces(archive), media_type="application/zip", headers=headers)


def _zip_adapter(services: Services, job_id: str) -> tuple[IO[bytes], int, str]:
    folder = _run(services, job_id).adapter
    if _adapter_bytes(folder) is None:
        raise ApiError(404, "This job has no adapter: it is not finished, or its model was deleted.", code="not_ready")
    job = services.jobs.get(job_id)
    name = safe_name(f"{job.fine_tuned_model or job_id}")
    archive = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _pieces)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as target:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                target.write(path, f"{name}/{path.name}")
    size = archive.tell()
    archive.seek(0)
    return archive, size, name


async def _pieces(archive: IO[bytes]) -> AsyncIterator[bytes]:
    try:
        while piece := await run_in_threadpool(archive.read, _CHUNK):
            yield piece
    finally:
        archive.close()
