"""A stand-in for OpenAI: files, fine-tuning jobs and chat over real HTTP, failing in whatever way a test asks for."""

from __future__ import annotations

import base64
import contextlib
import email
import email.policy
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tunery.openai_api.token_counter import TokenCounter

KEY = "sk-test-0123456789abcdef"
MODEL = "gpt-4.1-mini"
NO_FILE = {"message": "invalid training_file", "type": "invalid_request_error", "param": "training_file", "code": None}


@dataclass
class Failure:
    """What happens instead of an answer, `times` times, after `skip` requests that went well.

    Attributes:
        method, path: of the requests it happens to; `path` is a pattern for all behind /v1.
        status, code, message, headers: of an answer that says so.
        body: the whole answer, in place of an error.
        drop: the connection breaks off while the request is still being sent.
        lose: the request is carried out, and the connection breaks off before the answer.
        hang: seconds without an answer.
        late: with `hang`: the request is carried out after that time, when nobody may be waiting any more.
    """

    method: str
    path: str
    times: int = 1
    skip: int = 0
    status: int = 500
    code: str | None = None
    message: str = "something went wrong"
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    drop: bool = False
    lose: bool = False
    hang: float = 0.0
    late: bool = False


def film_answer(model: str, asked: str) -> str:
    """A tuned model tells fine films from dull ones; the base always finds them good."""
    if model.startswith("ft:"):
        return "good" if "fine" in asked else "bad"
    return "It is good."


@dataclass
class Fake:
    """The server's state, in the open.

    Attributes:
        statuses: a job's status at each look at it; the last one stays.
        error: of a job that fails.
        answer: (model, what the user says last) → what is answered.
        requests: "METHOD /path" of all requests.
        models: that can be trained.
        gone: models that answer no longer.
    """

    statuses: tuple[str, ...] = ("validating_files", "queued", "running", "running", "succeeded")
    error: dict[str, Any] | None = None
    answer: Callable[[str, str], str] = film_answer
    models: tuple[str, ...] = (MODEL, "gpt-4o-mini")
    gone: tuple[str, ...] = ()
    length_name: str = "max_tokens"
    knows_logprobs: bool = True
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    content: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def count(self, pattern: str) -> int:
        """Requests that match."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def failing(self, method: str, path: str) -> Failure | None:
        """The failure that this request meets, used up."""
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and failure.method == method and re.search(failure.path, path):
                    if failure.skip:
                        failure.skip -= 1
                        continue
                    failure.times -= 1
                    return failure
        return None

    # ------------------------------------------------------------- files and jobs

    def add_file(self, name: str, content: bytes, purpose: str = "fine-tune") -> dict[str, Any]:
        with self.lock:
            number = f"file-{len(self.files) + 1:024d}"
            self.content[number] = content
            self.files[number] = {
                "id": number,
                "object": "file",
                "bytes": len(content),
                "created_at": 1_780_000_000,
                "filename": name,
                "purpose": purpose,
                "status": "processed",
            }
            return self.files[number]

    def add_job(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            number = f"ftjob-{len(self.jobs) + 1:024d}"
            method = request.get("method") or {"type": "supervised", "supervised": {"hyperparameters": {}}}
            asked = method[method["type"]].get("hyperparameters", {})
            settled = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.8}
            settled |= {key: value for key, value in asked.items() if value != "auto"}
            self.jobs[number] = {
                "id": number,
                "object": "fine_tuning.job",
                "created_at": 1_780_000_000,
                "error": None,
                "fine_tuned_model": None,
                "finished_at": None,
                "hyperparameters": settled,
                "model": request["model"],
                "organization_id": "org-test",
                "result_files": [],
                "seed": request.get("seed", 42),
                "status": self.statuses[0],
                "trained_tokens": None,
                "training_file": request["training_file"],
                "validation_file": request.get("validation_file"),
                "metadata": request.get("metadata"),
                "method": {"type": method["type"], method["type"]: {"hyperparameters": settled}},
                "suffix": request.get("suffix") or "",
            }
            self.events[number] = []
            self.looks[number] = 0
            self._say(number, f"Created fine-tuning job: {number}")
            return self.jobs[number]

    def look(self, number: str) -> dict[str, Any]:
        """The job, a little further than at the last look."""
        with self.lock:
            job, at = self.jobs[number], min(self.looks[number], len(self.statuses) - 1)
            self.looks[number] += 1
            before, job["status"] = job["status"], self.statuses[at] if job["status"] != "cancelled" else "cancelled"
            if job["status"] != before:
                self._say(number, f"The job is now {job['status']}")
            if job["status"] == "running":
                self._train(number)
            elif job["status"] == "succeeded" and job["fine_tuned_model"] is None:
                self._finish(number)
            elif job["status"] == "failed":
                job["error"] = self.error
            return job

    def steps(self, number: str) -> int:
        job = self.jobs[number]
        rows = len(self.content[job["training_file"]].splitlines())
        hyper = job["hyperparameters"]
        return hyper["n_epochs"] * math.ceil(rows / hyper["batch_size"])

    def _train(self, number: str) -> None:
        total = self.steps(number)
        done = sum(event["type"] == "metrics" for event in self.events[number])
        half = math.ceil(total / 2)
        for step in range(done + 1, min(done + half, total) + 1):
            self._say(number, f"Step {step}/{total}: training loss={1 / step:.2f}", _metrics(step, total))

    def _finish(self, number: str) -> None:
        job, total = self.jobs[number], self.steps(number)
        lines = [
            f"{step},{1 / step},0.5,{2 / total if step == total else ''},{0.75 if step == total else ''}"
            for step in range(1, total + 1)
        ]
        table = "\n".join(["step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy", *lines])
        result = self.add_file("results.csv", base64.b64encode(table.encode()), "fine-tune-results")
        counter = TokenCounter(MODEL)
        rows = [json.loads(line) for line in self.content[job["training_file"]].decode().splitlines()]
        job |= {
            "fine_tuned_model": f"ft:{job['model']}:org::{number[-8:]}",
            "finished_at": 1_780_000_600,
            "result_files": [result["id"]],
            "trained_tokens": job["hyperparameters"]["n_epochs"] * sum(map(counter.row, rows)),
        }
        self._say(number, "The job has successfully completed")

    def _say(self, number: str, message: str, data: dict[str, Any] | None = None) -> None:
        events = self.events[number]
        events.append(
            {
                "id": f"ftevent-{number[-8:]}{len(events):016d}",
                "object": "fine_tuning.job.event",
                "created_at": 1_780_000_000 + len(events),
                "level": "info",
                "message": message,
                "type": "metrics" if data else "message",
                "data": data or {},
            }
        )


def _metrics(step: int, total: int) -> dict[str, Any]:
    data = {"step": step, "total_steps": total, "train_loss": 1 / step, "train_mean_token_accuracy": 0.5}
    if step == total:
        data |= {"full_valid_loss": 2 / total, "full_valid_mean_token_accuracy": 0.75}
    return data


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class calls it so)
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        url = urlsplit(self.path)
        path = url.path.removeprefix("/v1")
        self.fake.requests.append(f"{method} {path}")
        failure = self.fake.failing(method, path)
        length = int(self.headers.get("Content-Length") or 0)
        if failure and failure.drop:
            self.rfile.read(min(length, 512))
            self._break_off()
            return
        body = self.rfile.read(length)
        if failure and failure.lose:
            self._answer(method, path, parse_qs(url.query), body)
            self._break_off()
        elif failure and failure.hang:
            time.sleep(failure.hang)
            if failure.late:
                self._answer(method, path, parse_qs(url.query), body)
            self._break_off()
        elif failure:
            if failure.body is not None:
                self._send(failure.status, failure.body, {"Content-Type": "application/json", **failure.headers})
                return
            error = {"message": failure.message, "type": "error", "param": failure.param, "code": failure.code}
            self._send(failure.status, {"error": error}, failure.headers)
        elif self.headers.get("Authorization") != f"Bearer {KEY}":
            said = self.headers.get("Authorization", "").removeprefix("Bearer ")
            error = {"message": f"Incorrect API key provided: {said}.", "code": "invalid_api_key", "param": None}
            self._send(401, {"error": error})
        else:
            status, answer = self._answer(method, path, parse_qs(url.query), body)
            self._send(status, answer)

    def _break_off(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        fake = self.fake
        if (method, path) == ("POST", "/files"):
            return 200, fake.add_file(*_uploaded(self.headers["Content-Type"], body))
        if (method, path) == ("POST", "/fine_tuning/jobs"):
            return _create(fake, json.loads(body))
        if (method, path) == ("POST", "/chat/completions"):
            return _chat(fake, json.loads(body))
        if (method, path) == ("GET", "/fine_tuning/jobs"):
            jobs = list(reversed(fake.jobs.values()))
            return 200, {"object": "list", "data": jobs, "has_more": False}
        if (method, path) == ("GET", "/models"):
            return 200, {
                "object": "list",
                "data": [{"id": name, "object": "model", "created": 1, "owned_by": "x"} for name in fake.models],
            }
        if match := re.fullmatch(r"/files/([^/]+)/content", path):
            return (
                (200, fake.content[match[1]])
                if match[1] in fake.content
                else _missing(f"No such File object: {match[1]}")
            )
        if match := re.fullmatch(r"/fine_tuning/jobs/([^/]+)(/events|/cancel)?", path):
            return _job(fake, match[1], match[2] or "", query)
        return _missing(f"unknown: {path}")


def _missing(message: str) -> tuple[int, Any]:
    return 404, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def _create(fake: Fake, request: dict[str, Any]) -> tuple[int, Any]:
    if request["model"] not in fake.models and not request["model"].startswith("ft:"):
        error = {"message": f"{request['model']} cannot be fine-tuned", "param": "model", "code": "model_not_available"}
        return 400, {"error": error}
    if request["training_file"] not in fake.files:
        return 400, {"error": NO_FILE}
    return 200, fake.add_job(request)


def _job(fake: Fake, number: str, rest: str, query: dict[str, list[str]]) -> tuple[int, Any]:
    if number not in fake.jobs:
        return _missing(f"Could not find fine tune: {number}")
    if rest == "/cancel":
        fake.jobs[number]["status"] = "cancelled"
        return 200, fake.jobs[number]
    if rest == "/events":
        newest = list(reversed(fake.events[number]))
        after, limit = query.get("after", [""])[0], int(query.get("limit", ["20"])[0])
        start = next((i + 1 for i, event in enumerate(newest) if event["id"] == after), 0)
        page = newest[start : start + min(limit, 5)]  # small pages, so that they are turned
        return 200, {"object": "list", "data": page, "has_more": start + len(page) < len(newest)}
    return 200, fake.look(number)


def _chat(fake: Fake, request: dict[str, Any]) -> tuple[int, Any]:
    with fake.lock:
        fake.asked.append(request)
    if request["model"] in fake.gone:
        error = {"message": f"The model {request['model']} does not exist", "code": "model_not_found", "param": None}
        return 404, {"error": error}
    if fake.length_name not in request:
        message = f"Unsupported parameter: 'max_tokens'. Use '{fake.length_name}' instead."
        return 400, {"error": {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}}
    if request.get("logprobs") and not fake.knows_logprobs:
        return 400, {"error": {"message": "logprobs are not supported", "param": "logprobs", "code": None}}
    if any("weight" in message for message in request["messages"]):
        return 400, {"error": {"message": "unknown key weight", "param": "messages", "code": None}}
    said = str(request["messages"][-1]["content"])
    if "forbidden" in said:
        return 400, {"error": {"message": "the question was refused", "param": "messages", "code": "content_filter"}}
    text = fake.answer(request["model"], said)
    content = [{"token": word, "logprob": -0.05, "bytes": None, "top_logprobs": []} for word in text.split()]
    return 200, {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": request["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": {"content": content, "refusal": None} if request.get("logprobs") else None,
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": len(content), "total_tokens": 10 + len(content)},
    }


def _uploaded(content_type: str, body: bytes) -> tuple[str, bytes, str]:
    """(name, content, purpose) from a multipart form."""
    head = f"Content-Type: {content_type}\r\nMIME-Version: 1.0\r\n\r\n".encode()
    form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    parts = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}  # type: ignore[attr-defined]
    content: Any = parts["file"].get_payload(decode=True)
    purpose: Any = parts["purpose"].get_payload(decode=True)
    return str(parts["file"].get_filename()), content, purpose.decode()


@contextlib.contextmanager
def serving(fake: Fake, kind: type[Handler] = Handler, **more: Any) -> Iterator[Fake]:
    """The fake on a free port, for as long as the context lasts.

    Args:
        kind: what handles requests; `more` are its attributes.
    """
    handler = type("Handler", (kind,), {"fake": fake, **more})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
