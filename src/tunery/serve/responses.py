"""Answers as JSON: compact, UTF-8, and never NaN."""

from __future__ import annotations

import json

from starlette.responses import Response

from tunery.serve.api_errors import ApiError


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return Response(body, status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """An error's answer."""
    return json_response(error.body(), error.status, error.headers)
