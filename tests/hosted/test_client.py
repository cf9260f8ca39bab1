"""Patience with what passes, and plain words about what does not, through the official client over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hosted.conftest import Said
from tests.hosted.fake import KEY, Failure, Fake
from tunery.config_hosted import HostedConfig
from tunery.errors import ConfigError, HostedError, ResumableError
from tunery.evaluation.answers import Question
from tunery.hosted import client as client_module
from tunery.hosted.client import HostedServer, Service, base_url, explain
from tunery.hosted.job import EventLog, create, retrieve, upload
from tunery.hosted.querying import Asker


def models(service: Service) -> list[str]:
    return [model.id for model in service.call("listing models", lambda client: list(client.models.list()))]


@pytest.mark.parametrize(
    "failure",
    [
        Failure("GET", "/models", times=2, status=500),
        Failure("GET", "/models", times=2, status=503),
        Failure("GET", "/models", times=2, status=429, message="slow down"),
        Failure("GET", "/models", times=2, status=408),
        Failure("GET", "/models", times=2, drop=True),
        Failure("GET", "/models", times=2, lose=True),
    ],
    ids=["500", "503", "429", "408", "dropped", "answer lost"],
)
def test_a_failure_that_passes_is_waited_out(
    fake: Fake, service: Service, pauses: list[float], notes: Said, failure: Failure
) -> None:
    fake.failures.append(failure)
    assert models(service) == list(fake.models)
    assert len(pauses) == 2
    assert 0.4 <= pauses[0] < pauses[1]
    assert "listing models: " in notes[-1]
    assert "trying again" in notes[-1]


def test_a_server_that_hangs_is_asked_again(fake: Fake, notes: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "TIMEOUT", 0.2)
    fake.failures.append(Failure("GET", "/models", hang=0.6))
    assert models(Service(HostedConfig(), notes.append)) == list(fake.models)
    assert fake.count("GET /models") == 2


@pytest.mark.parametrize(("header", "value", "pause"), [("Retry-After", "7", 7.0), ("retry-after-ms", "1500", 1.5)])
def test_the_pause_is_the_one_the_server_asks_for(
    fake: Fake, service: Service, pauses: list[float], header: str, value: str, pause: float
) -> None:
    fake.failures.append(Failure("GET", "/models", status=429, headers={header: value}))
    models(service)
    assert pauses == [pause]


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "0"}, {"retry-after-ms": "0"}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}]
)
def test_a_server_that_asks_for_no_pause_is_not_asked_without_end(
    fake: Fake, service: Service, pauses: list[float], headers: dict[str, str]
) -> None:
    fake.failures.append(Failure("GET", "/models", times=30, status=429, headers=headers))
    with pytest.raises(ResumableError, match="too busy"):
        models(service)
    assert 60 < sum(pauses) <= client_module.PATIENCE


def test_a_date_to_wait_until_is_understood(fake: Fake, service: Service, pauses: list[float]) -> None:
    until = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    fake.failures.append(Failure("GET", "/models", status=503, headers={"Retry-After": until}))
    models(service)
    assert 25 < pauses[0] <= 30


def test_patience_has_an_end(fake: Fake, service: Service, pauses: list[float]) -> None:
    fake.failures.append(Failure("GET", "/models", times=1000, status=500, message="out of order"))
    with pytest.raises(ResumableError, match=r"listing models: .*failed again and again.*out of order") as stopped:
        models(service)
    assert stopped.value.exit_code == 75
    assert 60 < sum(pauses) <= client_module.PATIENCE
    pauses.clear()
    fake.failures[:] = [Failure("GET", "/models", status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(ResumableError, match="too busy or limits this key"):
        models(service)
    assert pauses == []


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        ({"status": 401, "code": "invalid_api_key"}, ConfigError, ["refuses the key in OPENAI_API_KEY", "environment"]),
        (
            {"status": 403, "code": "training_not_available", "message": "Fine-tuning is not available"},
            HostedError,
            [
                "trains no models for this account",
                "2026-05-07",
                "2026-07-02",
                "2027-01-06",
                "2027-01-14",
                "2027-04-14",
                "model=smollm2-135m-instruct",
                "Azure",
                "hosted.base_url",
                "tunery migrate",
            ],
        ),
        ({"status": 403, "message": "missing scope"}, HostedError, ["does not allow it to this key", "missing scope"]),
        ({"status": 404, "message": "no such thing"}, HostedError, ["does not know it", "/v1"]),
        ({"status": 429, "code": "insufficient_quota"}, ResumableError, ["no credit left", "add credit"]),
        ({"status": 429, "code": "daily_rate_limit_exceeded"}, ResumableError, ["today's jobs", "tomorrow"]),
        ({"status": 400, "message": "too odd", "param": "n_epochs"}, HostedError, ["too odd", "names n_epochs"]),
    ],
)
def test_what_does_not_pass_is_told_at_once_and_in_words(
    fake: Fake, service: Service, pauses: list[float], failure: dict[str, Any], kind: type[Exception], words: list[str]
) -> None:
    fake.failures.append(Failure("GET", "/models", times=5, **failure))
    with pytest.raises(kind) as stopped:
        models(service)
    for word in words:
        assert word in str(stopped.value)
    assert pauses == []
    assert fake.count("GET /models") == 1


def test_the_key_is_never_shown(fake: Fake, monkeypatch: pytest.MonkeyPatch, notes: Said) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-9876543210")
    with pytest.raises(ConfigError, match=r"Incorrect API key provided: …\.") as stopped:
        models(Service(HostedConfig(), notes.append))
    assert "sk-wrong" not in str(stopped.value)
    assert KEY not in repr(HostedServer("http://x", "K", KEY))


@pytest.mark.parametrize("key", ["sk-secret\nsk-more", "sk-sécret", "sk-secret more"])
def test_a_key_that_is_none_is_refused_without_showing_it(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, notes: Said, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="what OPENAI_API_KEY holds is not a key") as stopped:
        Service(HostedConfig(), notes.append)
    assert "cret" not in str(stopped.value)


def test_words_about_a_network_failure_are_without_the_key() -> None:
    error = explain(ValueError(f"cannot send {KEY}"), HostedServer("http://x/v1", "K", KEY), "looking")
    assert "cannot send …" in str(error)


def test_nothing_listening_is_an_unreachable_address(
    pauses: list[float], notes: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ResumableError, match=r"127\.0\.0\.1:9/v1 could not be reached"):
        models(Service(HostedConfig(base_url="http://127.0.0.1:9/v1"), notes.append))


def test_a_key_is_needed_except_on_this_machine(monkeypatch: pytest.MonkeyPatch, notes: Said) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        Service(HostedConfig(), notes.append)
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        Service(HostedConfig(base_url="https://elsewhere.example/v1", key_variable="MY_KEY"), notes.append)
    Service(HostedConfig(base_url="http://localhost:1/v1"), notes.append)
    assert notes == []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    Service(HostedConfig(base_url="http://elsewhere.example/v1"), notes.append)
    assert "not encrypted" in notes[0]


def test_the_address_is_the_settings_then_the_environments_then_openais(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert base_url(HostedConfig()) == "https://api.openai.com/v1"
    assert HostedServer(base_url(HostedConfig()), "K").is_openais
    monkeypatch.setenv("OPENAI_BASE_URL", "https://there.example/v1/")
    assert base_url(HostedConfig()) == "https://there.example/v1"
    assert not HostedServer(base_url(HostedConfig()), "K").is_openais
    assert base_url(HostedConfig(base_url="http://here.example/v1")) == "http://here.example/v1"
    for wrong in ("ftp://x/v1", "https://me:secret@x/v1", "nonsense"):
        monkeypatch.setenv("OPENAI_BASE_URL", wrong)
        with pytest.raises(ConfigError, match="not the address") as stopped:
            base_url(HostedConfig())
        assert "secret" not in str(stopped.value)


HTML = {"Content-Type": "text/html"}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers"),
    [
        ("POST", "/chat", {"error": {"message": "no"}}, {}),
        ("POST", "/chat", {"choices": []}, {}),
        ("POST", "/chat", {"choices": [{"message": None}]}, {}),
        ("POST", "/chat", b"<html>hello</html>", {}),
        ("POST", "/chat", b"<html>hello</html>", HTML),
        ("POST", "/chat", b"null", {}),
        ("GET", "/fine_tuning/jobs/x", {"error": {"message": "no"}}, {}),
        ("GET", "/fine_tuning/jobs/x", {"id": "x"}, {}),
        ("GET", "/fine_tuning/jobs/x", b"<html>hello</html>", HTML),
        ("GET", "/fine_tuning/jobs$", b"<html>hello</html>", HTML),
        ("POST", "/fine_tuning/jobs$", {"error": {"message": "no"}}, {}),
        ("POST", "/files", {"error": {"message": "no"}}, {}),
        ("GET", "/events", {"data": [{"object": "event"}]}, {}),
    ],
    ids=str,
)
def test_an_odd_answer_is_told_of_and_no_bug(
    fake: Fake, service: Service, tmp_path: Path, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    asker = Asker(service, "gpt-4.1", 8)
    requests: dict[str, Callable[[], Any]] = {
        "/chat": lambda: asker.ask(Question("f:1", ({"role": "user", "content": "?"},))),
        "/fine_tuning/jobs/x": lambda: retrieve(service, "x"),
        "/fine_tuning/jobs$": lambda: create(service, {"model": "x", "training_file": "f"}),
        "/files": lambda: upload(service, tmp_path / "rows.jsonl"),
        "/events": lambda: EventLog(tmp_path / "events.jsonl").fetch(service, "x"),
    }
    fake.failures.append(Failure(method, path, status=200, body=body, headers=headers))
    with pytest.raises(HostedError, match="not as OpenAI's API does"):
        requests[path]()


def test_an_address_that_serves_something_else_is_noticed(fake: Fake, service: Service) -> None:
    fake.content["file-page"] = b"<html>hello</html>"

    def page(client: Any) -> Any:
        return client.get("/files/file-page/content", cast_to=str)

    with pytest.raises(HostedError, match="not as OpenAI's API does"):
        service.call("looking", page)
