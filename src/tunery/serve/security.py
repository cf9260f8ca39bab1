"""Who may ask, and how much: pure ASGI layers around the application.

A server on loopback is reachable from every web page that this machine's browser opens. Two things keep pages out:
the Host header must name this machine (else a page's own domain, pointed at 127.0.0.1, would pass: DNS rebinding), and
a request that changes something must not come from another origin.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunery.serve.api_errors import ApiError, from_exception, server_error
from tunery.serve.responses import error_response
from tunery.serve.server_settings import MEGABYTE, ServeSettings, is_loopback

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OPEN_PATHS = ("/", "/health", "/favicon.ico")
"""Need no key. Neither does /web/: the page asks for the key, and it must be there to ask."""

DATA_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
"""Content-Security-Policy of answers that are data: if a browser shows one after all, nothing in it runs."""

_log = logging.getLogger("tunery.serve")


class Layer:
    """A layer that may refuse a request.

    Args:
        check: raises ApiError to refuse.
    """

    def __init__(self, app: ASGIApp, check: Callable[[Scope, Headers], None]):
        self.app = app
        self.check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with the refusal."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.check(scope, Headers(scope=scope))
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def check_host(settings: ServeSettings) -> Callable[[Scope, Headers], None]:
    """The Host header must be a name of this machine, or an allowed one; on other addresses, only if some are given."""
    guarded = is_loopback(settings.host) or bool(settings.allow_hosts)

    def check(scope: Scope, headers: Headers) -> None:
        host = host_name(headers.get("host", ""))
        if guarded and not (is_loopback(host) or host in settings.allow_hosts):
            raise ApiError(
                403,
                "This server answers to localhost only. If it is meant to be reached under the name in the Host "
                "header, start it with --allow-host NAME.",
                code="host_not_allowed",
            )

    return check


def check_origin(settings: ServeSettings) -> Callable[[Scope, Headers], None]:
    """A request that changes something must not come from another server's web page."""

    def check(scope: Scope, headers: Headers) -> None:
        if scope["method"] in SAFE_METHODS:
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is None:
            foreign = site in ("cross-site", "same-site")
        else:
            own = origin.lower().partition("://")[2] == headers.get("host", "").lower() != ""
            foreign = not own and origin.lower() not in settings.allow_origins
        if foreign:
            raise ApiError(
                403,
                "A web page of another origin may not use this server. If it should, start the server with "
                "--allow-origin ORIGIN.",
                code="origin_not_allowed",
            )

    return check


def check_key(keys: Sequence[str]) -> Callable[[Scope, Headers], None]:
    """One of the keys must be given as a bearer token. Each comparison takes the same time, match or not."""
    digests = [_digest(key) for key in keys]

    def check(scope: Scope, headers: Headers) -> None:
        if not digests or is_open(scope["path"]):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        bearer = scheme.lower() == "bearer" and bool(given)
        matches = [hmac.compare_digest(_digest(given.strip()), digest) for digest in digests]
        if not (bearer and any(matches)):
            words = "Incorrect API key provided." if bearer else "You didn't provide an API key."
            raise ApiError(
                401,
                f"{words} Give one of the server's keys as 'Authorization: Bearer KEY' (OPENAI_API_KEY in the "
                "official client).",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    return check


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith("/web/")


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


class BodyLimit:
    """Refuses bodies that are too long: by their announced length at once, else when the limit is passed.

    Args:
        limit_of: the most bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, limit_of: Callable[[Scope], int]):
        self.app = app
        self.limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, its body counted while it is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, seen = self.limit_of(scope), 0
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
            await error_response(_too_large(limit))(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _too_large(limit)
            return message

        await self.app(scope, counted, send)


def body_limit(settings: ServeSettings) -> Callable[[Scope], int]:
    """The limits of the settings: one for uploads, with room for the form around the file, and one for all else."""

    def limit_of(scope: Scope) -> int:
        if scope["method"] == "POST" and scope["path"] == "/v1/files":
            return settings.upload_limit + MEGABYTE
        return settings.json_limit

    return limit_of


def _too_large(limit: int) -> ApiError:
    size = f"{limit / MEGABYTE:,.3g} MB" if limit >= MEGABYTE else f"{limit:,} bytes"
    return ApiError(
        413,
        f"The request is too large: at most {size} are taken. (--upload-limit sets it for files.)",
        code="request_too_large",
        headers={"connection": "close"},  # the rest of the body is not read
    )


class Envelope:
    """The outermost layer: an id and the headers of every answer, and the last resort for errors.

    Args:
        organization: the name in `openai-organization`.
    """

    def __init__(self, app: ASGIApp, organization: str):
        self.app = app
        self.organization = organization

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; an exception that nothing else has answered is logged and answered with 500."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, begun = f"req_{secrets.token_hex(16)}", False, time.perf_counter()

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._complete(MutableHeaders(scope=message), request_id, time.perf_counter() - begun)
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception as error:
            answer = from_exception(error)
            if answer is None:
                _log.exception("%s %s failed (%s)", scope["method"], scope["path"], request_id)
                answer = server_error(request_id)
            if not started:
                await error_response(answer)(scope, receive, with_headers)

    def _complete(self, headers: MutableHeaders, request_id: str, seconds: float) -> None:
        headers["x-request-id"] = request_id
        headers["openai-processing-ms"] = str(round(1000 * seconds))
        headers["openai-organization"] = self.organization
        headers["openai-version"] = "2020-10-01"
        headers["x-content-type-options"] = "nosniff"
        headers["referrer-policy"] = "no-referrer"
        headers["cross-origin-resource-policy"] = "same-origin"
        headers.setdefault("content-security-policy", DATA_POLICY)
        headers.setdefault("cache-control", "no-store")
