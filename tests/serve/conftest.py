"""A server over stand-ins, for each test that wants one, and a plain HTTP client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serve.echo import EchoBackend
from tests.serve.fakes import FakeFiles, FakeJobs, FakeRegistry
from tests.serve.running import Running, running
from tunery.serve.server_settings import make_settings

Start = Callable[..., Running]


def over_stand_ins(folder: Path, **values: Any) -> Any:
    """A context in which a server with these settings answers."""
    settings = make_settings(**{"bases": ("tiny",), "home": folder / "home", **values})
    files = FakeFiles(folder / "files", settings.upload_limit)
    registry = FakeRegistry(settings.bases, dict(settings.aliases))
    return running(settings, FakeJobs(files, registry, folder / "jobs"), files, registry, EchoBackend())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server with these settings; it is stopped when the test ends."""
    with ExitStack() as stack:
        yield lambda **values: stack.enter_context(over_stand_ins(tmp_path, **values))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with default settings for tests that change nothing in it."""
    with over_stand_ins(tmp_path_factory.mktemp("plain")) as server:
        yield server


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """As `plain`, with two keys."""
    with over_stand_ins(tmp_path_factory.mktemp("keyed"), api_keys=("first-key", "second-key")) as server:
        yield server


@pytest.fixture(scope="session")
def http() -> Iterator[httpx2.Client]:
    """Follows nothing, hides nothing."""
    with httpx2.Client(timeout=30) as client:
        yield client
