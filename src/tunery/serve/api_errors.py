"""Errors as OpenAI's API answers them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping

from tunery.errors import AdapterError, ConfigError, DataError, NotInstalledError, ResumableError, TuneryError
from tunery.jsonl import JsonObject

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
        status: of the HTTP answer.
        message: one sentence or two: what is wrong, and what to do.
        type: invalid_request_error, rate_limit_exceeded or server_error, among OpenAI's.
        code: machine-readable, such as model_not_found; None where OpenAI has none.
        param: the request's field that is wrong, as a path: messages[0].content.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> JsonObject:
        """The JSON of the answer."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class Busy(ApiError):
    """All rows are taken and the queue is full: try again later."""

    def __init__(self, retry_after_seconds: float):
        seconds = max(1, math.ceil(retry_after_seconds))
        super().__init__(
            429,
            f"This server is answering as many requests as it can. Try again in {seconds} s.",
            type="rate_limit_exceeded",
            code="rate_limit_exceeded",
            headers={"retry-after": str(seconds)},
        )


def not_found(what: str, name: str) -> ApiError:
    """404 for an object that is not there, as OpenAI words it; `what` is File, fine-tuning job, …"""
    return ApiError(404, f"No such {what}: {shorten(name)}", code=None, param="id")


def server_error(request_id: str | None = None) -> ApiError:
    """500: a bug of ours. The traceback is in the server's log, under the request's id; the client never sees it."""
    where = f" Its log has the details, under {request_id}." if request_id else ""
    return ApiError(500, f"The server had an error while processing your request.{where}", type="server_error")


def from_exception(error: Exception) -> ApiError | None:
    """What a client is told of an exception; None if it is a bug of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TuneryError):
        return _from_tunery(error)
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return ApiError(507, "The disk of the server is full: free some space and try again.", type="server_error")
    return None


def _from_tunery(error: TuneryError) -> ApiError:
    hint = None if isinstance(error, NotInstalledError) else error.hint
    message = error.message if hint is None else f"{error.message} ({hint})"
    if isinstance(error, ResumableError):
        return ApiError(507, message, type="server_error")
    if isinstance(error, ConfigError | DataError | AdapterError):
        return ApiError(400, message, code="invalid_value")
    return ApiError(500, message, type="server_error")


def shorten(text: str, limit: int = 80) -> str:
    """A client's text, fit to stand in a message: without control codes, cut at `limit` characters."""
    clean = "".join(character if character.isprintable() else "�" for character in text[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[:limit]}…"
