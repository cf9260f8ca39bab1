"""What the official client does not show: raw streams, broken requests, clients that leave, stopping, starting."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.serve.conftest import Start
from tests.serve.echo import EchoBackend
from tests.serve.fakes import FakeFiles, FakeJobs, FakeRegistry
from tests.serve.running import Running, running
from tunery.errors import ConfigError
from tunery.serve.app import bind, create_app, serve, welcome
from tunery.serve.server_settings import make_settings


def ask(said: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": said}], **more}


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def release(server: Running) -> None:
    """Let the answers that wait go on; the event belongs to the server's loop."""
    backend: EchoBackend = server.parts[3]
    backend.loop.call_soon_threadsafe(backend.release.set)


# --------------------------------------------------------------------------- streams


def test_the_stream_on_the_wire(plain: Running, http: httpx2.Client) -> None:
    body = ask("hello", stream=True, stream_options={"include_usage": True})
    answer = http.post(f"{plain.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-2]] == ["you ", "said: ", "hello"]
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_line_ends_in_the_text_do_not_break_events(plain: Running) -> None:
    client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="x")
    said = "a\u2028b\u2029c\x85d\r\ne"
    chunks = client.chat.completions.create(**ask(said), stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "you said: " + "".join(said.split())


def test_comments_keep_a_silent_stream_open(start: Start, http: httpx2.Client) -> None:
    server = start(keep_alive=0.05)
    with http.stream("POST", f"{server.url}/v1/chat/completions", json=ask("silent", stream=True)) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
        release(server)
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"


def test_an_error_in_the_middle_is_an_event(start: Start, http: httpx2.Client) -> None:
    server = start()
    answer = http.post(f"{server.url}/v1/chat/completions", json=ask("break", stream=True))
    assert answer.status_code == 200
    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert "the engine broke" not in answer.text
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x")
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(**ask("break"), stream=True))
    assert server.parts[3].open == 0


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_item_have_their_status(start: Start, http: httpx2.Client, stream: bool) -> None:
    server = start()
    url = f"{server.url}/v1/chat/completions"
    busy = http.post(url, json=ask("busy", stream=stream))
    assert busy.status_code == 429
    assert busy.headers["retry-after"] == "7"
    assert busy.json()["error"]["code"] == "rate_limit_exceeded"
    long = http.post(url, json=ask("too long", stream=stream))
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    bug = http.post(url, json=ask("bug", stream=stream))
    assert bug.status_code == 500
    assert "secret" not in bug.text
    assert bug.headers["x-request-id"] in bug.json()["error"]["message"]
    assert server.parts[3].open == 0


def test_the_client_s_rate_limit_error(plain: Running) -> None:
    client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**ask("busy"))
    assert caught.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_frees_the_rows(start: Start, stream: bool) -> None:
    server = start()
    backend: EchoBackend = server.parts[3]
    with httpx2.Client(timeout=30) as http:
        if stream:
            with http.stream("POST", f"{server.url}/v1/chat/completions", json=ask("wait", stream=True)) as answer:
                lines = answer.iter_lines()  # dropping it would close the connection
                assert next(lines).startswith("data: ")
                assert backend.open == 1
        else:
            with pytest.raises(httpx2.TimeoutException):
                http.post(f"{server.url}/v1/chat/completions", json=ask("silent"), timeout=0.3)
    until(lambda: backend.open == 0)
    assert backend.closed == 1


def test_leaving_before_the_stream_has_begun(start: Start) -> None:
    server = start(keep_alive=60)
    backend: EchoBackend = server.parts[3]
    with httpx2.Client() as http, pytest.raises(httpx2.TimeoutException):
        http.post(f"{server.url}/v1/chat/completions", json=ask("silent", stream=True), timeout=0.3)
    until(lambda: backend.open == 0)
    assert backend.closed == 1


# --------------------------------------------------------------------------- requests that are none


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_unknown_addresses_and_methods(plain: Running, http: httpx2.Client) -> None:
    nowhere = http.post(f"{plain.url}/v1/embeddings", json={})
    assert nowhere.status_code == 404
    assert "Unknown request URL: POST /v1/embeddings" in error_of(nowhere)["message"]
    forgot = http.post(f"{plain.url}/chat/completions", json={})
    assert "Did you forget /v1?" in error_of(forgot)["message"]
    assert "Did you forget" not in error_of(http.get(f"{plain.url}/nothing"))["message"]
    put = http.put(f"{plain.url}/v1/files")
    assert put.status_code == 405
    assert "PUT" in error_of(put)["message"]
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert http.get(f"{plain.url}{path}").status_code == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "parse the JSON"),
        (b"{", "parse the JSON"),
        (b'{"model": "tiny", "messages": "\xff"}', "parse the JSON"),
        (b"[" * 100_000, "parse the JSON"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b'{"model": 3, "messages": []}', "'model'"),
        (b'{"model": "tiny"}', "Missing required parameter: 'messages'"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
            "out of range",
        ),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 50 + b"}", "'seed'"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
    ],
)
def test_bodies_that_cannot_be_read(plain: Running, http: httpx2.Client, body: bytes, words: str) -> None:
    headers = {"content-type": "application/json"}
    answer = http.post(f"{plain.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert words in error_of(answer)["message"]


def test_content_types(plain: Running, http: httpx2.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": kind}
        answer = http.post(f"{plain.url}/v1/chat/completions", content=json.dumps(ask("hi")), headers=headers)
        assert answer.status_code == 415
        assert "application/json" in error_of(answer)["message"]
    assert http.post(f"{plain.url}/v1/files", json={}).status_code == 415


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("/v1/files?limit=0", "limit"),
        ("/v1/files?limit=10001", "limit"),
        ("/v1/files?order=up", "order"),
        ("/v1/fine_tuning/jobs?limit=many", "limit"),
        ("/v1/fine_tuning/jobs?metadata=team", "metadata"),
        ("/v1/files?after=file-unknown", "after"),
    ],
)
def test_queries_out_of_bounds(plain: Running, http: httpx2.Client, query: str, param: str) -> None:
    answer = http.get(f"{plain.url}{query}")
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


def test_forms_that_are_no_uploads(plain: Running, http: httpx2.Client) -> None:
    url, file = f"{plain.url}/v1/files", ("a.jsonl", b"{}\n")
    for parts, param in (
        ({"files": {"file": file}}, "purpose"),
        ({"files": {"other": (None, "x")}, "data": {"purpose": "fine-tune"}}, "other"),
        ({"files": {"nothing": (None, "")}, "data": {"purpose": "fine-tune"}}, "nothing"),
        ({"files": {"file": (None, "text")}, "data": {"purpose": "fine-tune"}}, "file"),
        ({"files": {"file": file, "purpose": ("p.txt", b"fine-tune")}}, None),
    ):
        answer = http.post(url, **parts)  # type: ignore[arg-type]
        assert answer.status_code == 400, answer.text
        assert error_of(answer)["param"] == param
    broken = http.post(url, content=b"no form", headers={"content-type": "multipart/form-data; boundary=x"})
    assert broken.status_code == 400
    none = http.post(url, content=b"", headers={"content-type": "multipart/form-data"})
    assert none.status_code == 400


# --------------------------------------------------------------------------- what the page asks for


def test_extras(start: Start, http: httpx2.Client) -> None:
    server = start(aliases={"gpt-4o-mini": "tiny"})
    facts = http.get(f"{server.url}/api/server").json()
    assert facts["bases"] == ["tiny"]
    assert facts["aliases"] == {"gpt-4o-mini": "tiny"}
    assert facts["needs_key"] is False
    assert facts["limits"]["upload_bytes"] == server.settings.upload_limit
    assert facts["engine"] == {"active": 0, "waiting": 0}
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x")
    file = client.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    url = f"{server.url}/api/jobs/{job.id}"
    assert http.get(f"{url}/adapter.zip").status_code == 404
    assert http.get(f"{url}/report").status_code == 404
    while client.fine_tuning.jobs.retrieve(job.id).status != "succeeded":
        pass
    archive = http.get(f"{url}/adapter.zip")
    assert archive.headers["content-type"] == "application/zip"
    assert int(archive.headers["content-length"]) == len(archive.content)
    assert _names(archive.content) == ["adapter_config.json", "adapter_model.safetensors"]
    kinds = {
        model["id"]: (model["kind"], model["job"]) for model in http.get(f"{server.url}/api/models").json()["data"]
    }
    tuned = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert kinds == {"tiny": ("base", None), "gpt-4o-mini": ("alias", None), tuned: ("fine-tuned", job.id)}


def _names(archive: bytes) -> list[str]:
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(archive)) as found:
        assert found.testzip() is None
        return sorted(Path(name).name for name in found.namelist())


def test_metrics_are_thinned_and_continued(start: Start, http: httpx2.Client) -> None:
    server = start()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x")
    file = client.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    url = f"{server.url}/api/jobs/{job.id}/metrics"
    assert http.get(url).json() == {"lines": [], "total_steps": None, "report": False, "adapter_bytes": None}
    run = server.parts[0].run_dir(job.id)
    run.mkdir(parents=True)
    lines = [{"step": step, "train_loss": 1.0} for step in range(1, 5001)]
    lines += [{"step": step, "valid_loss": 2.0} for step in range(500, 5001, 500)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = http.get(url).json()["lines"]
    assert len([line for line in shown if "train_loss" in line]) == 2000
    assert len([line for line in shown if "valid_loss" in line]) == 10
    assert (shown[0]["step"], shown[1999]["step"]) == (1, 5000)
    assert {line["step"] for line in http.get(f"{url}?after=4998").json()["lines"]} == {4999, 5000}


# --------------------------------------------------------------------------- life


def test_stopping_ends_answers_and_stops_the_parts(start: Start) -> None:
    """An answer that goes on is ended with an error event, within seconds; the jobs and the backend are stopped."""
    server = start(stop_seconds=0.3)
    jobs, _, _, backend = server.parts
    assert jobs.started
    assert backend.started
    seen: list[str] = []

    def listen() -> None:
        with httpx2.Client(timeout=30) as http:
            body = ask("wait", stream=True)
            with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
                seen.extend(answer.iter_lines())

    thread = threading.Thread(target=listen)
    thread.start()
    until(lambda: backend.open == 1)
    server.stop()
    thread.join(timeout=10)
    last = [line for line in seen if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    assert jobs.stopped
    assert backend.stopped
    assert backend.open == 0


def test_a_part_that_cannot_start_is_the_error(tmp_path: Path) -> None:
    class Broken(EchoBackend):
        async def start(self) -> None:
            raise ConfigError("no such base")

    settings = make_settings(bases=("tiny",), home=tmp_path, port=0)
    files, registry = FakeFiles(tmp_path / "files"), FakeRegistry(("tiny",), {})
    jobs = FakeJobs(files, registry, tmp_path)
    app = create_app(settings, jobs, files, registry, Broken())  # type: ignore[arg-type]
    with bind("127.0.0.1", 0) as listening, pytest.raises(ConfigError, match="no such base"):
        serve(app, listening, lambda: None)
    assert jobs.stopped


def test_a_port_in_use(start: Start) -> None:
    server = start()
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port}.*in use"):
        bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot be used"):
        bind("192.0.2.1", 0)  # TEST-NET-1: nobody's address


def test_welcome_says_what_a_person_needs(start: Start) -> None:
    server = start(aliases={"gpt-4o-mini": "tiny"})
    text = welcome(server.server._services)
    for words in ("OPENAI_BASE_URL=http://127.0.0.1:", "/v1", "OPENAI_API_KEY=anything", "gpt-4o-mini → tiny"):
        assert words in text
    assert str(server.settings.home) in text


def test_deleting_a_model_is_told_to_the_backend(start: Start) -> None:
    server = start()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x")
    file = client.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    while (found := client.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
        pass
    client.models.delete(found.fine_tuned_model or "")
    assert server.parts[3].forgotten == [job.id]


def test_two_servers_in_one_process(tmp_path: Path) -> None:
    """Nothing about a server is kept in a module."""
    for name in ("one", "two"):
        settings = make_settings(bases=("tiny",), home=tmp_path / name)
        files, registry = FakeFiles(tmp_path / name), FakeRegistry(("tiny",), {})
        parts = (FakeJobs(files, registry, tmp_path / name), files, registry, EchoBackend())
        with running(settings, *parts) as server:
            assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
