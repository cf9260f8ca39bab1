"""The application and its server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import tunery
from tunery.errors import ConfigError
from tunery.serve.api_errors import ApiError
from tunery.serve.responses import error_response
from tunery.serve.routes import ROUTERS
from tunery.serve.routes.page import page_router, read_parts
from tunery.serve.routes.services import Services
from tunery.serve.schemas.base import explain_first
from tunery.serve.security import BodyLimit, Envelope, Layer, body_limit, check_host, check_key, check_origin
from tunery.serve.server_settings import ServeSettings

if TYPE_CHECKING:
    from tunery.serve.engine.backend import Backend
    from tunery.serve.files import Files
    from tunery.serve.jobs.service import Jobs
    from tunery.serve.registry import Registry

ORGANIZATION = "local"


def create_app(settings: ServeSettings, jobs: Jobs, files: Files, registry: Registry, backend: Backend) -> FastAPI:
    """The application over these parts; its lifespan starts and stops the jobs and the backend."""
    app = FastAPI(
        title="tunery",
        version=tunery.__version__,
        openapi_url=None,  # its pages load scripts from a network
        redirect_slashes=False,
        lifespan=_lifespan,
        middleware=_layers(settings),
    )
    app.state.services = Services(settings, jobs, files, registry, backend)
    app.state.failure = None
    for router in (*ROUTERS, page_router(read_parts())):
        app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _bad_query)
    return app


def _layers(settings: ServeSettings) -> list[Middleware]:
    """Around the routes, the outermost first."""
    layers = [
        Middleware(Envelope, organization=ORGANIZATION),
        Middleware(Layer, check=check_host(settings)),
        Middleware(Layer, check=check_origin(settings)),
        Middleware(Layer, check=check_key(settings.api_keys)),
        Middleware(BodyLimit, limit_of=body_limit(settings)),
    ]
    if settings.allow_origins:
        shared = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
        layers.insert(3, shared)  # a browser asks in advance without the key
    return layers


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    async with contextlib.AsyncExitStack() as stack:
        try:
            await run_in_threadpool(services.jobs.start)  # first: it finds out whether the folder is in use
            stack.push_async_callback(run_in_threadpool, services.jobs.stop)
            await services.backend.start()
            stack.push_async_callback(services.backend.stop)
        except Exception as error:
            app.state.failure = error  # for serve(), which says it better than uvicorn's log
            raise
        yield


# --------------------------------------------------------------------------- errors


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown addresses, methods, forms that cannot be read."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:200]}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        hint = " Did you forget /v1?" if _has_route(request, f"/v1{request.url.path}") else ""
        message, code = f"Unknown request URL: {asked}. Please check the URL for typos.{hint}", "unknown_url"
    elif error.status_code == 405:
        message, code = f"Not allowed: {asked}. Allowed here: {headers.get('allow', 'another method')}.", None
    else:
        message, code = str(error.detail), None
    return error_response(ApiError(error.status_code, message, code=code, headers=headers))


def _has_route(request: Request, path: str) -> bool:
    scope = {**request.scope, "path": path}
    return any(route.matches(scope)[0].value for route in request.app.routes)


async def _bad_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    item = dict(error.errors()[0])
    item["loc"] = item["loc"][1:]  # without "query" in front
    return error_response(explain_first(item))


# --------------------------------------------------------------------------- the server


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready, and ends answers that go on for too long when it is stopped.

    Args:
        ready: called when connections are accepted.
    """

    def __init__(self, app: FastAPI, settings: ServeSettings, ready: Callable[[], object] = lambda: None):
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level=logging.CRITICAL,  # errors of the application are logged by Envelope
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=64 << 10,  # request line and headers
                timeout_keep_alive=75,
                timeout_graceful_shutdown=round(settings.stop_seconds) + 2,
            )
        )
        self._services: Services = app.state.services
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections; give answers a few seconds; then stop the parts."""
        asyncio.get_running_loop().call_later(self._services.settings.stop_seconds, self._services.closing.set)
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """The server's socket.

    Raises:
        ConfigError: the address is taken, or is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":  # there it would let two servers share a port
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        hints = {
            errno.EADDRINUSE: (f"port {port} of {host} is in use", "stop what uses it, or choose another with --port"),
            errno.EACCES: (f"no permission to use port {port}", "choose one from 1024 on with --port"),
        }
        message, hint = hints.get(
            error.errno or 0, (f"the address {host}:{port} cannot be used: {error.strerror or error}", "see --host")
        )
        raise ConfigError(message, hint) from None
    return found


def serve(app: FastAPI, listening: socket.socket, ready: Callable[[], object]) -> None:
    """Answer requests that come to this socket until a signal comes.

    Raises:
        TuneryError: a part could not be started.
    """
    services: Services = app.state.services
    services.settings = services.settings.model_copy(update={"port": listening.getsockname()[1]})
    try:
        Server(app, services.settings, ready).run(sockets=[listening])
    except SystemExit:  # newer uvicorn's way to say that the lifespan could not begin; older ones return
        if app.state.failure is None:
            raise
    if app.state.failure is not None:
        raise app.state.failure


def run(settings: ServeSettings) -> None:
    """`tunery serve`: build the parts and answer until a signal comes.

    Raises:
        ConfigError: another server uses the folder, the address is taken, or a base cannot be found.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{settings.home} cannot be made: {error.strerror}", "choose another folder with --home"
        ) from None
    with bind(settings.host, settings.port) as listening, contextlib.ExitStack() as stack:
        app = create_app(settings, *make_parts(settings, stack))
        serve(app, listening, lambda: sys.stderr.write(welcome(app.state.services)))


def make_parts(settings: ServeSettings, stack: contextlib.ExitStack) -> tuple[Jobs, Files, Registry, Backend]:
    from tunery.serve.files import Files
    from tunery.serve.jobs.service import Jobs
    from tunery.serve.registry import Registry
    from tunery.serve.store import Store

    store = Store(settings.home / "server.sqlite3")
    stack.callback(store.close)
    files = Files(settings.home / "files", store, max_bytes=settings.upload_limit)
    registry = Registry(store, settings.home / "jobs", settings.bases, settings.aliases, adapters=settings.adapters)
    jobs = Jobs(settings.home, store, files, registry, slots=settings.slots, task_defaults=settings.task_defaults)
    return jobs, files, registry, _backend(settings)


def _backend(settings: ServeSettings) -> Backend:
    if settings.engine:
        from tunery.serve.engine.remote import RemoteBackend

        return RemoteBackend(settings.engine, kind=settings.engine_kind)
    from tunery.serve.engine.local import LocalBackend

    return LocalBackend(list(settings.bases), max_rows=settings.max_rows, max_queue=settings.max_queue)


def welcome(services: Services) -> str:
    """What a person needs once the server answers."""
    settings = services.settings
    names = [*settings.bases, *(f"{alias} → {base}" for alias, base in settings.aliases.items()), *settings.adapters]
    key = "one of TUNERY_API_KEYS" if settings.api_keys else "anything"
    return (
        f"tunery {tunery.__version__} answers at {settings.url}\n"
        f"  page    {settings.url}/\n"
        f"  models  {', '.join(names)}\n"
        f"  data    {settings.home}\n"
        "To point a script at it:\n"
        f"  export OPENAI_BASE_URL={settings.url}/v1\n"
        f"  export OPENAI_API_KEY={key}\n"
    )
