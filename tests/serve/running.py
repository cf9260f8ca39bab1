"""A real server over given parts, in a thread of the test process, on a free port of loopback."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunery.serve.app import Server, bind, create_app
from tunery.serve.server_settings import ServeSettings


@dataclass
class Running:
    """A server that answers.

    Attributes:
        url: without /v1.
        parts: (jobs, files, registry, backend).
    """

    url: str
    settings: ServeSettings
    parts: tuple[Any, Any, Any, Any]
    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        """As a signal would, and wait until it is done."""
        self.server.should_exit = True
        self.thread.join(timeout=60)
        assert not self.thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def running(settings: ServeSettings, jobs: Any, files: Any, registry: Any, backend: Any) -> Iterator[Running]:
    """Answer requests while the context lasts."""
    app, ready = create_app(settings, jobs, files, registry, backend), threading.Event()
    with bind("127.0.0.1", 0) as listening:
        server = Server(app, settings, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert ready.wait(60), "the server did not start"
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        found = Running(url, settings, (jobs, files, registry, backend), server, thread)
        try:
            yield found
        finally:
            if thread.is_alive():
                found.stop()
