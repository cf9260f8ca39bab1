"""Reading requests: a JSON body, an id, a filter; and answering mistakes with one sentence."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from starlette.requests import Request as HttpRequest

from tunery.serve.api_errors import ApiError, not_found
from tunery.serve.schemas.base import Request, parse

T = TypeVar("T", bound=Request)

_IDS = {"file": re.compile(r"file-[A-Za-z0-9]{24}"), "fine-tuning job": re.compile(r"ftjob-[A-Za-z0-9]{24}")}


def json_body(model: type[T]) -> Callable[[HttpRequest], Awaitable[T]]:
    """A dependency that reads the body as this model."""

    async def read(request: HttpRequest) -> T:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise ApiError(
                415,
                f"Unsupported content type: '{media[:80]}'. Send JSON, as 'Content-Type: application/json'.",
                code="unsupported_content_type",
            )
        return parse(model, await request.body())

    return read


def require_id(what: str, given: str) -> str:
    """An id of the right form: `file` or `fine-tuning job`.

    Raises:
        ApiError: 404, as for an id that does not exist.
    """
    if not _IDS[what].fullmatch(given):
        raise not_found(what, given)
    return given


def metadata_filter(request: HttpRequest) -> dict[str, str] | Literal["null"]:
    """The `metadata[key]=value` pairs of the query; "null" for `metadata=null`, which asks for objects without any.

    Raises:
        ApiError: 400, both forms are there, or another value.
    """
    pairs = {
        match[1]: value
        for key, value in request.query_params.multi_items()
        if (match := re.fullmatch(r"metadata\[(.*)\]", key, re.DOTALL))
    }
    plain = request.query_params.get("metadata")
    if plain is None:
        return pairs
    if plain != "null" or pairs:
        raise ApiError(
            400, "A filter is written metadata[key]=value, or metadata=null.", code="invalid_value", param="metadata"
        )
    return "null"
