"""A stand-in for the server, to work on the page and to test it: the same addresses, jobs that only pretend.

    python -m tests.serve.page.fake_server --port 8123 --demo      # then open http://127.0.0.1:8123

What a message to the chat says can make it fail: "break" cuts the first stream, "busy" answers 429 once, "refuse" 400.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import socket
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from tests.serve.page.fake_jobs import ALIASES, BASE, FINAL, FakeJob, Json, StoredFile

WEB = Path(__file__).parents[3] / "src" / "tunery" / "serve" / "web"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; font-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Refusal(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": "invalid_request_error", "code": code, "param": param},
        }


class State:
    """All that outlives a restart."""

    def __init__(self, seconds_a_step: float = 0.05, seconds_a_token: float = 0.02, key: str = ""):
        self.seconds_a_step, self.seconds_a_token, self.key = seconds_a_step, seconds_a_token, key
        self.files: dict[str, StoredFile] = {}
        self.jobs: dict[str, FakeJob] = {}
        self.broken: set[str] = set()  # messages whose stream was cut already

    def advance(self) -> None:
        """Move every job; one runs at a time."""
        for job in list(self.jobs.values()):  # requests run in threads
            busy = any(other.status == "running" for other in list(self.jobs.values()) if other is not job)
            job.advance(free=not busy)
            if job.status == "succeeded" and not job.result_files:
                steps = [line for line in job.lines if "train_loss" in line]
                rows = ["step,train_loss", *(f"{line['step']},{line['train_loss']:.4f}" for line in steps)]
                results = StoredFile("step_metrics.csv", "\n".join(rows).encode(), purpose="fine-tune-results")
                self.files[results.id] = results
                job.result_files = [results.id]

    def job(self, name: str) -> FakeJob:
        """A job by id."""
        self.advance()
        if name not in self.jobs:
            raise Refusal(404, f"No fine-tuning job with the id '{name}'.", param="fine_tuning_job_id")
        return self.jobs[name]

    def file(self, name: str) -> StoredFile:
        """A file by id."""
        if name not in self.files:
            raise Refusal(404, f"No such File object: {name}", param="id")
        return self.files[name]

    def models(self) -> list[Json]:
        """What /api/models lists."""
        self.advance()
        plain: Json = {"base": BASE, "job": None, "created": 1760000000, "bytes": None}
        rows: list[Json] = [{"id": BASE, "kind": "base", **plain}]
        rows += [{**rows[0], "id": alias, "kind": "alias", "base": base} for alias, base in ALIASES.items()]
        for job in list(self.jobs.values()):  # requests run in threads
            if job.model and not job.deleted:
                tuned = {"id": job.model, "kind": "fine-tuned", "base": job.asked["model"], "job": job.id}
                rows.append({**tuned, "created": job.finished_at, "bytes": 19_600_000})
        return rows


# --------------------------------------------------------------------------- /v1


def _page(items: list[Json], request: Request, limit: int) -> JSONResponse:
    limit = int(request.query_params.get("limit", limit))
    after = request.query_params.get("after")
    start = next((index + 1 for index, item in enumerate(items) if item["id"] == after), 0) if after else 0
    part = items[start : start + limit]
    body = {"object": "list", "data": part, "has_more": start + limit < len(items)}
    first, last = (part[0]["id"], part[-1]["id"]) if part else (None, None)
    return JSONResponse({**body, "first_id": first, "last_id": last})


def _state(request: Request) -> State:
    return request.app.state.fake


async def upload(request: Request) -> Response:
    """POST /v1/files."""
    form = await request.form()
    sent: Any = form["file"]
    file = StoredFile(sent.filename, await sent.read(), purpose=str(form["purpose"]))
    _state(request).files[file.id] = file
    return JSONResponse(file.wire())


async def files(request: Request) -> Response:
    """GET /v1/files."""
    purpose = request.query_params.get("purpose")
    found = [file.wire() for file in _state(request).files.values() if purpose in (None, file.purpose)]
    return _page(found[::-1], request, 10_000)


async def one_file(request: Request) -> Response:
    """GET and DELETE /v1/files/{id}."""
    file = _state(request).file(request.path_params["id"])
    if request.method == "DELETE":
        del _state(request).files[file.id]
        return JSONResponse({"id": file.id, "object": "file", "deleted": True})
    return JSONResponse(file.wire())


async def content(request: Request) -> Response:
    """GET /v1/files/{id}/content."""
    file = _state(request).file(request.path_params["id"])
    return Response(file.content, media_type="application/octet-stream")


async def jobs(request: Request) -> Response:
    """GET and POST /v1/fine_tuning/jobs."""
    state = _state(request)
    if request.method == "POST":
        asked = await request.json()
        job = FakeJob(asked, state.file(asked["training_file"]), state.seconds_a_step)
        state.jobs[job.id] = job
        return JSONResponse(job.wire())
    state.advance()
    found = sorted(state.jobs.values(), key=lambda job: job.created_at)
    return _page([job.wire() for job in found[::-1]], request, 20)


async def one_job(request: Request) -> Response:
    """GET /v1/fine_tuning/jobs/{id}."""
    return JSONResponse(_state(request).job(request.path_params["id"]).wire())


async def steer(request: Request) -> Response:
    """POST /v1/fine_tuning/jobs/{id}/pause, resume, cancel."""
    job = _state(request).job(request.path_params["id"])
    verb = request.path_params["verb"]
    if job.status in FINAL:
        raise Refusal(400, f"This job has {job.status}; it cannot be changed any more.")
    if verb == "resume":
        job.status = "queued"
    else:
        job.status = {"pause": "paused", "cancel": "cancelled"}[verb]
        job.say({"pause": "The job was paused", "cancel": "The job was cancelled"}[verb])
    if verb == "cancel":
        job.finished_at = int(time.time())
    return JSONResponse(job.wire())


async def events(request: Request) -> Response:
    """GET /v1/fine_tuning/jobs/{id}/events."""
    return _page(_state(request).job(request.path_params["id"]).events[::-1], request, 20)


async def checkpoints(request: Request) -> Response:
    """GET /v1/fine_tuning/jobs/{id}/checkpoints."""
    return _page(_state(request).job(request.path_params["id"]).checkpoints[::-1], request, 10)


async def delete_model(request: Request) -> Response:
    """DELETE /v1/models/{id}."""
    name = request.path_params["id"]
    for job in _state(request).jobs.values():
        if job.model == name:
            job.deleted = True
            return JSONResponse({"id": name, "object": "model", "deleted": True})
    raise Refusal(404, f"The model '{name}' does not exist.", code="model_not_found")


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions, streamed."""
    state = _state(request)
    asked = await request.json()
    text: str = asked["messages"][-1]["content"]
    known = {model["id"] for model in state.models()} | {
        each["fine_tuned_model_checkpoint"] for job in state.jobs.values() for each in job.checkpoints
    }
    if asked["model"] not in known:
        raise Refusal(404, f"The model '{asked['model']}' does not exist.", code="model_not_found", param="model")
    if "refuse" in text:
        raise Refusal(400, "This prompt has 9,000 tokens; the model reads up to 8,192.", code="context_length_exceeded")
    once = f"{asked['model']}|{text}"
    first, _ = once not in state.broken, state.broken.add(once)
    if "busy" in text and first:
        refusal = Refusal(429, "Too many requests wait already.", code="rate_limit_exceeded")
        return JSONResponse(refusal.body, 429, {"Retry-After": "1"})
    words = _answer(asked).split(" ")[: asked.get("max_completion_tokens") or 256]
    return StreamingResponse(_chunks(state, asked, words, "break" in text and first), media_type="text/event-stream")


def _answer(asked: Json) -> str:
    turns = len([message for message in asked["messages"] if message["role"] == "user"])
    question = asked["messages"][-1]["content"]
    if "delivery" in question and asked["model"].startswith("ft:"):
        return "I'm sorry your order is late. Please give me the order number, and I will look up where it is at once."
    if "delivery" in question:
        return (
            "Deliveries can take longer for many reasons, such as the weather, customs, or the carrier's workload. It "
            "is recommended to contact the company's customer service and to ask about the status of the order. They "
            "will be able to provide you with more information about the delivery."
        )
    system = next((f" ({m['content']})" for m in asked["messages"] if m["role"] == "system"), "")
    voice = "In short: " if asked["model"].startswith("ft:") else "As a language model, "
    return f"{voice}turn {turns} answers “{question}”{system}. " + "One word follows another here. " * 3


async def _chunks(state: State, asked: Json, words: Iterable[str], cut: bool) -> AsyncIterator[str]:
    def chunk(**more: Any) -> str:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": asked["model"]}
        return f"data: {json.dumps({**head, **more})}\n\n"

    count = 0
    yield chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    for count, word in enumerate(words, start=1):
        await asyncio.sleep(state.seconds_a_token)
        if cut and count == 5:
            return  # without the end that a whole stream has
        delta = {"content": word if count == 1 else f" {word}"}
        yield chunk(choices=[{"index": 0, "delta": delta, "finish_reason": None}])
    reason = "length" if count == asked.get("max_completion_tokens") else "stop"
    yield chunk(choices=[{"index": 0, "delta": {}, "finish_reason": reason}])
    yield chunk(choices=[], usage={"prompt_tokens": 30, "completion_tokens": count, "total_tokens": 30 + count})
    yield "data: [DONE]\n\n"


# --------------------------------------------------------------------------- /api


async def server(request: Request) -> Response:
    """GET /api/server."""
    body = {"version": "0.1.0", "bases": [BASE], "aliases": ALIASES, "default_model": BASE, "engine": {}}
    return JSONResponse({**body, "limits": {"upload_bytes": 512_000_000}, "needs_key": bool(_state(request).key)})


async def models(request: Request) -> Response:
    """GET /api/models."""
    return JSONResponse({"data": _state(request).models()})


async def check(request: Request) -> Response:
    """POST /api/files/{id}/check."""
    asked = dict(request.query_params)
    return JSONResponse(_state(request).file(request.path_params["id"]).check(asked["method"], asked))


async def metrics(request: Request) -> Response:
    """GET /api/jobs/{id}/metrics."""
    job = _state(request).job(request.path_params["id"])
    after = int(request.query_params.get("after", -1))
    lines = [line for line in job.lines if line["step"] > after]
    done = job.status == "succeeded"
    body = {"lines": lines, "total_steps": job.total, "report": done, "adapter_bytes": 19_600_000 if done else None}
    return JSONResponse(body)


async def adapter(request: Request) -> Response:
    """GET /api/jobs/{id}/adapter.zip."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("adapter_config.json", "{}")
    headers = {"Content-Disposition": 'attachment; filename="adapter.zip"'}
    return Response(packed.getvalue(), headers=headers, media_type="application/zip")


async def report(_: Request) -> Response:
    """GET /api/jobs/{id}/report."""
    return HTMLResponse("<!doctype html><title>Report</title><h1>Base vs. tuned</h1>")


ROUTES: list[tuple[str, Callable[..., Any], list[str]]] = [
    ("/", lambda _: FileResponse(WEB / "index.html"), ["GET"]),
    ("/v1/files", upload, ["POST"]),
    ("/v1/files", files, ["GET"]),
    ("/v1/files/{id}", one_file, ["GET", "DELETE"]),
    ("/v1/files/{id}/content", content, ["GET"]),
    ("/v1/fine_tuning/jobs", jobs, ["GET", "POST"]),
    ("/v1/fine_tuning/jobs/{id}", one_job, ["GET"]),
    ("/v1/fine_tuning/jobs/{id}/events", events, ["GET"]),
    ("/v1/fine_tuning/jobs/{id}/checkpoints", checkpoints, ["GET"]),
    ("/v1/fine_tuning/jobs/{id}/{verb}", steer, ["POST"]),
    ("/v1/models/{id}", delete_model, ["DELETE"]),
    ("/v1/chat/completions", chat, ["POST"]),
    ("/api/server", server, ["GET"]),
    ("/api/models", models, ["GET"]),
    ("/api/files/{id}/check", check, ["POST"]),
    ("/api/jobs/{id}/metrics", metrics, ["GET"]),
    ("/api/jobs/{id}/adapter.zip", adapter, ["GET"]),
    ("/api/jobs/{id}/report", report, ["GET"]),
]


async def _guard(request: Request, call_next: Callable[..., Any]) -> Response:
    """The key, where one is needed, and the headers of the page."""
    key = request.app.state.fake.key
    open_path = request.url.path == "/" or request.url.path.startswith("/web/")
    if key and not open_path and request.headers.get("Authorization") != f"Bearer {key}":
        return JSONResponse(Refusal(401, "Incorrect API key provided.", code="invalid_api_key").body, 401)
    response = await call_next(request)
    if open_path:
        response.headers.update(HEADERS)
    return response


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status)


def make_app(state: State) -> Starlette:
    """The application around `state`."""
    app = Starlette(
        routes=[Route(path, endpoint, methods=methods) for path, endpoint, methods in ROUTES],
        exception_handlers={Refusal: _refuse},
    )
    app.mount("/web", StaticFiles(directory=WEB))
    app.add_middleware(BaseHTTPMiddleware, dispatch=_guard)
    app.state.fake = state
    return app


class FakeServer:
    """The application on a free port, in a thread. It can be stopped and started again, on the same port and state."""

    def __init__(self, state: State, port: int = 0):
        self.state, self.port = state, port

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; returns once it answers."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(make_app(self.state), log_level="warning", timeout_graceful_shutdown=0)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Drop every connection."""
        self.server.should_exit = True
        self.thread.join()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--key", default="")
    parser.add_argument("--seconds-a-step", type=float, default=0.5)
    parser.add_argument("--demo", action="store_true", help="begin with some jobs")
    chosen = parser.parse_args()
    state = State(chosen.seconds_a_step, 0.06, chosen.key)
    if chosen.demo:
        from tests.serve.page.demo import fill

        fill(state)
    FakeServer(state, chosen.port).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
