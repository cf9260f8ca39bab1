"""/v1/files: what jobs are trained on, and their result files."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from python_multipart.exceptions import FormParserError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from tunery.serve.api_errors import ApiError
from tunery.serve.responses import json_response
from tunery.serve.routes.body import require_id
from tunery.serve.routes.services import Injected
from tunery.serve.schemas.objects import FileObject, deleted, listed, one

router = APIRouter(prefix="/v1/files")

_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
_SMALL_FIELD = 4096


@router.post("")
async def upload(request: Request, services: Injected) -> Response:
    """Keep a file: a form with `file`, `purpose` and perhaps `expires_after`."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "multipart/form-data":
        raise ApiError(
            415,
            f"Unsupported content type: '{media[:80]}'. An upload is a form: 'multipart/form-data'.",
            code="unsupported_content_type",
        )
    try:
        form = await request.form(max_files=1, max_fields=len(_FIELDS), max_part_size=_SMALL_FIELD)
    except FormParserError as error:  # newer starlette says so itself
        raise ApiError(400, f"The form cannot be read: {error}") from None
    try:
        file, purpose, expires = _read_form(form)
        kept = await run_in_threadpool(
            services.files.upload, file.file, plain_filename(file.filename), purpose, expires
        )
    finally:
        await form.close()
    return json_response(one(FileObject, kept))


def _read_form(form: FormData) -> tuple[UploadFile, str, int | None]:
    if unknown := [name for name in form if name not in _FIELDS]:
        raise ApiError(400, f"Unknown parameter: '{unknown[0][:80]}'.", code="unknown_parameter", param=unknown[0][:80])
    file, purpose = form.get("file"), form.get("purpose")
    for name, value, kind in (("file", file, UploadFile), ("purpose", purpose, str)):
        if value is None:
            raise ApiError(400, f"Missing required parameter: '{name}'.", code="missing_required_parameter", param=name)
        if not isinstance(value, kind):
            words = "a file, with a filename" if kind is UploadFile else "a text, not a file"
            raise ApiError(400, f"Invalid type for '{name}': expected {words}.", code="invalid_type", param=name)
    assert isinstance(file, UploadFile)
    return file, str(purpose), _expiry(form)


def _expiry(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise ApiError(
            400,
            "Invalid value for 'expires_after.anchor'. Supported values are: 'created_at'.",
            code="invalid_value",
            param="expires_after.anchor",
        )
    if not isinstance(seconds, str) or not re.fullmatch(r"[0-9]{1,9}", seconds):
        raise ApiError(
            400,
            "Invalid type for 'expires_after.seconds': expected an integer.",
            code="invalid_type",
            param="expires_after.seconds",
        )
    return int(seconds)


def plain_filename(name: str | None) -> str:
    """What a client calls a file, without folders and control codes; it is shown, and never becomes a path."""
    last = re.split(r"[/\\]", name or "")[-1]
    return "".join(character for character in last if character.isprintable())[:255] or "upload.jsonl"


@router.get("")
def list_files(
    services: Injected,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """A page of the files."""
    page = services.files.list(purpose=purpose, limit=limit, order=order, after=after)
    return json_response(listed(FileObject, page.data, page.has_more))


@router.get("/{file_id}")
def retrieve(file_id: str, services: Injected) -> Response:
    """A file's facts."""
    return json_response(one(FileObject, services.files.get(require_id("file", file_id))))


@router.delete("/{file_id}")
def delete(file_id: str, services: Injected) -> Response:
    """Delete a file."""
    services.files.delete(require_id("file", file_id))
    return json_response(deleted("file", file_id))


@router.get("/{file_id}/content")
def content(file_id: str, services: Injected) -> Response:
    """A file's bytes, as they were uploaded."""
    file = services.files.get(require_id("file", file_id))
    return FileResponse(services.files.content(file_id), media_type="application/octet-stream", filename=file.filename)
