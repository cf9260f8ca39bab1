"""The server as someone meets it who should not get in, or who sends too much."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path

import httpx2
import openai
import pytest
from fastapi.routing import APIRoute

from tests.serve.conftest import Start
from tests.serve.running import Running
from tunery.errors import ConfigError
from tunery.serve.routes import ROUTERS
from tunery.serve.routes.page import page_router
from tunery.serve.security import host_name
from tunery.serve.server_settings import make_settings

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
KEYED = {"api_keys": ("first-key", "second-key")}


# --------------------------------------------------------------------------- keys


def test_other_addresses_need_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.4", "::", "example.com"):
        with pytest.raises(ConfigError, match="TUNERY_API_KEYS"):
            make_settings(bases=("tiny",), home=tmp_path, host=host)
        make_settings(bases=("tiny",), home=tmp_path, host=host, api_keys=("k",))
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        make_settings(bases=("tiny",), home=tmp_path, host=host)


def test_every_route_but_health_and_the_page_needs_the_key(keyed: Running, http: httpx2.Client) -> None:
    tried = 0
    for path, methods in _routes():
        for method in methods:
            answer = http.request(method, keyed.url + path)
            if path in ("/", "/health", "/favicon.ico") or path.startswith("/web/"):
                assert answer.status_code != 401, path
                continue
            tried += 1
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert tried >= 20
    assert http.get(f"{keyed.url}/v1/no-such-route").status_code == 401


def _routes() -> list[tuple[str, set[str]]]:
    """(path, methods) of every route."""
    found = []
    for router in (*ROUTERS, page_router({})):
        for route in router.routes:
            assert isinstance(route, APIRoute)
            path = route.path.replace("{job_id}", "ftjob-" + "a" * 24).replace("{file_id}", "file-" + "a" * 24)
            found.append((path.replace("{name:path}", "x").replace("{name}", "x"), route.methods or set()))
    return found


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", "Bearer first-ke", "Bearer first-key2", "Basic first-key", "first-key"],
)
def test_wrong_keys(keyed: Running, http: httpx2.Client, authorization: str) -> None:
    answer = http.get(f"{keyed.url}/v1/models", headers={"authorization": authorization})
    assert answer.status_code == 401
    assert "first-key" not in answer.text


def test_right_keys(keyed: Running) -> None:
    for key in KEYED["api_keys"]:
        client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key)
        assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="x").models.list()


def test_keys_do_not_show_in_the_settings(tmp_path: Path) -> None:
    settings = make_settings(bases=("tiny",), home=tmp_path, **KEYED)
    assert "first-key" not in repr(settings) + str(settings)


# --------------------------------------------------------------------------- hosts and origins


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "0.0.0.0:8000"])
def test_another_host_name_is_refused(plain: Running, http: httpx2.Client, host: str) -> None:
    """A page whose own domain points at 127.0.0.1 (DNS rebinding) sends its own name."""
    for path in ("/v1/models", "/health", "/"):
        answer = http.get(plain.url + path, headers={"host": host})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "127.0.0.53"])
def test_names_of_this_machine(plain: Running, http: httpx2.Client, host: str) -> None:
    assert http.get(f"{plain.url}/v1/models", headers={"host": host}).status_code == 200


def test_an_allowed_host(start: Start, http: httpx2.Client) -> None:
    server = start(allow_hosts=("Tunery.LAN",))
    assert http.get(f"{server.url}/v1/models", headers={"host": "tunery.lan:80"}).status_code == 200
    assert http.get(f"{server.url}/v1/models", headers={"host": "other.lan"}).status_code == 403


def test_host_names() -> None:
    assert [host_name(text) for text in ("A:1", "[::1]:80", "::1", "a.b", "")] == ["a", "::1", "::1", "a.b", ""]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1"},
        {"origin": "garbage"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_foreign_page_changes_nothing(plain: Running, http: httpx2.Client, headers: dict[str, str]) -> None:
    before = len(plain.parts[3].asked), len(plain.parts[1].kept)
    answers = [
        http.post(f"{plain.url}/v1/chat/completions", json=ASK, headers=headers),
        http.post(f"{plain.url}/v1/files", files={"file": ("a", b"x")}, headers=headers),
        http.post(f"{plain.url}/v1/fine_tuning/jobs/ftjob-{'a' * 24}/cancel", headers=headers),
        http.delete(f"{plain.url}/v1/models/tiny", headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [403] * 4
    assert answers[0].json()["error"]["code"] == "origin_not_allowed"
    assert (len(plain.parts[3].asked), len(plain.parts[1].kept)) == before


def test_the_page_itself_may(plain: Running, http: httpx2.Client) -> None:
    headers = {"origin": plain.url, "sec-fetch-site": "same-origin"}
    assert http.post(f"{plain.url}/v1/chat/completions", json=ASK, headers=headers).status_code == 200


def test_no_sharing_with_other_origins_unless_asked_for(plain: Running, http: httpx2.Client) -> None:
    answer = http.get(f"{plain.url}/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.options(f"{plain.url}/v1/models", headers=asked).headers


def test_an_allowed_origin(start: Start, http: httpx2.Client) -> None:
    server = start(allow_origins=("https://friend.example",), **KEYED)
    friend = {"origin": "https://friend.example"}
    asked = {**friend, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    before = http.options(f"{server.url}/v1/chat/completions", headers=asked)
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == "https://friend.example"
    key = {"authorization": "Bearer first-key"}
    answer = http.post(f"{server.url}/v1/chat/completions", json=ASK, headers={**friend, **key})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    refused = http.post(
        f"{server.url}/v1/chat/completions", json=ASK, headers={"origin": "https://evil.example", **key}
    )
    assert refused.status_code == 403


@pytest.mark.parametrize("origin", ["friend.example", "https://", "*", "https://a/b", "file://x"])
def test_origins_are_checked(tmp_path: Path, origin: str) -> None:
    with pytest.raises(ConfigError, match="origin"):
        make_settings(bases=("tiny",), home=tmp_path, allow_origins=(origin,))


# --------------------------------------------------------------------------- limits


def test_json_bodies_are_limited(start: Start, http: httpx2.Client) -> None:
    server = start(json_limit=1000)
    answer = http.post(f"{server.url}/v1/chat/completions", json={**ASK, "user": "x" * 2000})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_uploads_are_limited(start: Start, http: httpx2.Client) -> None:
    server = start(upload_limit=2000)
    small = http.post(f"{server.url}/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b"x" * 2000)})
    assert small.status_code == 200
    large = http.post(f"{server.url}/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b"x" * 2001)})
    assert large.status_code == 413
    assert large.json()["error"]["param"] == "file"


def test_a_body_of_unknown_length_is_cut_off(start: Start) -> None:
    """Chunked, without a length in front: read up to the limit, and no further."""
    server = start(json_limit=10_000)
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()
    piece = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    sent = 0
    try:
        for _ in range(10_000):
            connection.send(piece)
            sent += len(piece)
    except OSError:  # the server has closed the connection
        pass
    assert sent < 40_000_000
    try:
        answer = connection.getresponse()
        assert answer.status == 413
    except (ConnectionError, http.client.HTTPException):  # its answer was lost with the connection
        pass
    connection.close()
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_a_false_length_is_no_way_around(start: Start) -> None:
    server = start(json_limit=100)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 5\r\n\r\n" + b"x" * 1_000
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 400")  # five bytes that are not JSON


def test_too_many_headers(plain: Running) -> None:
    with socket.create_connection(("127.0.0.1", int(plain.url.rpartition(":")[2])), timeout=30) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"x: yyyyyyyyyy\r\n" * 20_000 + b"\r\n")
            reply = connection.recv(100)
        except OSError:  # cut off
            reply = b""
    assert b" 200 " not in reply
    assert httpx2.get(f"{plain.url}/health").status_code == 200


# --------------------------------------------------------------------------- paths and content


@pytest.mark.parametrize(
    "name",
    [
        "../server.sqlite3",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e%2fx",
        "/etc/passwd",
        "file-../../x",
        "file-" + "a" * 23,
        "%00",
    ],
)
def test_ids_never_become_paths(plain: Running, tmp_path: Path, name: str) -> None:
    port = int(plain.url.rpartition(":")[2])
    for path in (
        f"/v1/files/{name}",
        f"/v1/files/{name}/content",
        f"/v1/fine_tuning/jobs/{name}",
        f"/web/{name}",
        f"/api/jobs/{name}/adapter.zip",
        f"/api/jobs/{name}/report",
        f"/v1/models/{name}",
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)  # sends the path as it is
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 404, path
        assert json.loads(answer.read())["error"]["message"]
        connection.close()


def test_headers_of_every_answer(plain: Running, http: httpx2.Client) -> None:
    for path in ("/health", "/v1/models", "/v1/nothing", "/"):
        headers = http.get(plain.url + path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-request-id"].startswith("req_")
        assert "server" not in headers


def test_an_uploaded_page_does_not_run(plain: Running, http: httpx2.Client) -> None:
    evil = ("evil.html", b"<script>alert(1)</script>", "text/html")
    made = http.post(f"{plain.url}/v1/files", data={"purpose": "fine-tune"}, files={"file": evil}).json()
    answer = http.get(f"{plain.url}/v1/files/{made['id']}/content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in answer.headers["content-security-policy"]


def test_what_a_client_sends_does_not_break_messages(plain: Running, http: httpx2.Client) -> None:
    nasty = "\x1b[31m\r\n{curly} %s \u202e" + "x" * 500
    answer = http.post(f"{plain.url}/v1/chat/completions", json={**ASK, nasty: 1})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "\x1b" not in message
    assert len(message) < 300
    assert http.get(f"{plain.url}/v1/files/{'y' * 5000}").json()["error"]["message"].count("y") < 100
