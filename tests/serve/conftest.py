"""A server over stand-ins, for each test that wants one, and a plain HTTP client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serve.fakes import EchoBackend, FakeFiles, FakeJobs, FakeRegistry
from tests.serve.running import Running, running
from tunery.serve.settings import make_settings

Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server with these settings; it is stopped when the test ends."""
    with ExitStack() as stack:

        def begin(**values: Any) -> Running:
            settings = make_settings(**{"bases": ("tiny",), "home": tmp_path / "home", **values})
            files = FakeFiles(tmp_path / "files", settings.upload_limit)
            registry = FakeRegistry(settings.bases, dict(settings.aliases))
            jobs = FakeJobs(files, registry, tmp_path / "jobs")
            return stack.enter_context(running(settings, jobs, files, registry, EchoBackend()))

        yield begin


@pytest.fixture
def http() -> Iterator[httpx2.Client]:
    """Follows nothing, hides nothing."""
    with httpx2.Client(timeout=30) as client:
        yield client
