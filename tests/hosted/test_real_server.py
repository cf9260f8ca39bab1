"""The hosted route and the move against `tunery serve` itself, a second process that stands in for OpenAI, also through
failures."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import tunery
from tests.hosted.conftest import Watching, write_chats, write_task
from tests.hosted.fake import KEY, Failure, Fake, serving
from tests.hosted.proxy import Passing
from tests.tiny import save_tiny_llama
from tunery.config_hosted import HostedConfig
from tunery.hosted import client as client_module
from tunery.hosted.client import Service
from tunery.hosted.job import create, retrieve, upload
from tunery.jsonl import read_lines
from tunery.moving import migrate

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("tunery.serve.app") is None, reason="there is no server yet"),
    pytest.mark.slow,
]

MODEL = "gpt-4o-mini-2024-07-18"
PATIENCE = 120
"""Seconds that the server may take to answer, or a job to end."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, served as gpt-4o-mini and moved to."""
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def address(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server process, which answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    command = ["serve", "--base", str(base), "--alias", f"gpt-4o-mini={base}", "--port", str(port), "--home", str(home)]
    with open(home / "server.log", "wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "tunery.cli", *command], stdout=log, stderr=log)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", home / "server.log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the server does not answer: {log.read_text()[-2000:]}")


@pytest.fixture
def there(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task, and the server in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    write_task(tmp_path)
    return tmp_path


def test_the_same_task_trained_here_and_there_gives_two_reports(there: Path, base: Path) -> None:
    here = tunery.train("task.yaml", [f"model={base}", "name=here"], progress=Watching())
    progress = Watching()
    hosted = tunery.train(
        "task.yaml", [f"model=openai:{MODEL}", "name=there"], progress=progress, consent=lambda _: True
    )
    assert here.evaluation is not None
    assert hosted.evaluation is not None
    assert hosted.evaluation["rows"] == here.evaluation["rows"] == 8
    assert hosted.receipt["hosted"]["tuned_model"].startswith(f"ft:{MODEL}:")
    assert hosted.receipt["hosted"]["billed_tokens"] > 0
    steps = [json.loads(line) for line in (hosted.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "train_loss" in line] == list(range(1, 9))
    assert any("valid_loss" in line for line in steps)
    assert progress.started is not None
    assert progress.started[0] == 8
    for run in (here, hosted):
        assert (run.path / "report.html").exists()


def test_rows_that_the_server_refuses_are_named(there: Path) -> None:
    service = Service(HostedConfig(), lambda _: None)
    (there / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 12)
    job = _done(service, {"model": MODEL, "training_file": upload(service, there / "bad.jsonl")["id"]})
    assert job["status"] == "failed"
    assert job["error"]["code"] == "invalid_training_file"


def test_a_job_made_by_any_script_is_moved(there: Path, base: Path) -> None:
    service = Service(HostedConfig(), lambda _: None)
    files = {
        name: upload(service, write_chats(there / f"{name}.jsonl", numbers))["id"]
        for name, numbers in (("training", range(40)), ("validation", range(100, 110)))
    }
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 8}}}
    request = {"model": MODEL, "method": method, "seed": 7, "suffix": "films", "metadata": {"team": "films"}}
    job = _done(service, {**request, "training_file": files["training"], "validation_file": files["validation"]})
    assert job["status"] == "succeeded", job["error"]
    done = migrate(job["id"], str(base), out="moved", progress=Watching(), consent=lambda _: True)
    assert done.answers == 10
    assert done.result is not None
    assert done.result["rows"] == 10
    assert done.result["from"]["metadata"] == {"team": "films"}
    assert done.result["agreement"]["exact"]["share"] > 0.5, "the same base on the same rows"
    assert done.run is not None
    assert (done.run.path / "side-by-side.html").exists()


def test_a_run_through_failures_ends_as_one_without(there: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"model=openai:{MODEL}"]
    plain = tunery.train("task.yaml", [*settings, "name=plain"], progress=Watching(), consent=lambda _: True)
    before = _jobs()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(client_module, "TIMEOUT", 4.0)
    with serving(Fake(), Passing, target=address) as proxy:
        monkeypatch.setenv("OPENAI_BASE_URL", proxy.address)
        proxy.failures = [
            Failure("POST", "/files", drop=True),
            Failure("POST", "/files", skip=1, status=500),
            Failure("POST", "/fine_tuning/jobs$", skip=1, lose=True),  # the first one asks whether it may be made
            Failure("GET", "/fine_tuning/jobs/[^/]+$", times=2, status=503),
            Failure("GET", "/events", hang=6.0),
            Failure("GET", "/events", skip=1, drop=True),
            Failure("POST", "/chat", times=2, status=429, headers={"Retry-After": "1"}),
            Failure("POST", "/chat", skip=3, lose=True),
            Failure("POST", "/chat", skip=5, status=500),
        ]
        failures = list(proxy.failures)
        broken = tunery.train("task.yaml", [*settings, "name=broken"], progress=Watching(), consent=lambda _: True)
        assert _jobs() == before + 1
    assert [failure for failure in failures if failure.times] == [], "all of them happened"
    assert plain.evaluation is not None
    assert broken.evaluation is not None
    for side in ("base", "tuned"):
        assert broken.evaluation[side] == plain.evaluation[side]
    losses = [
        [(line["step"], line["train_loss"]) for line in read_lines(run.path / "metrics.jsonl") if "train_loss" in line]
        for run in (plain, broken)
    ]
    assert losses[0] == losses[1]


def _jobs() -> int:
    service = Service(HostedConfig(), lambda _: None)
    return service.call("listing jobs", lambda client: len(list(client.fine_tuning.jobs.list(limit=100))))


def _done(service: Service, request: Mapping[str, Any]) -> dict[str, Any]:
    job = create(service, request)
    until = time.monotonic() + PATIENCE
    while job["status"] not in ("succeeded", "failed", "cancelled") and time.monotonic() < until:
        time.sleep(0.3)
        job = retrieve(service, job["id"])
    return job
