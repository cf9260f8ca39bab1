"""A server to be asked much at once: `python -m tests.serve.torture.streams HOME BASE NAME=ADAPTER…`.

It computes in float64 and prints its address when it answers.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from tests.serve.running import running
from tunery.serve.app import make_parts
from tunery.serve.engine.local import LocalBackend
from tunery.serve.server_settings import make_settings


def main() -> None:
    """Serve until a signal comes."""
    home, base = Path(sys.argv[1]), sys.argv[2]
    adapters = {name: Path(path) for name, _, path in (text.partition("=") for text in sys.argv[3:])}
    settings = make_settings(bases=(base,), aliases={"base": base}, adapters=adapters, home=home)
    with contextlib.ExitStack() as stack:
        jobs, files, registry, _ = make_parts(settings, stack)
        backend = LocalBackend([base], max_rows=24, precision="float64")
        server = stack.enter_context(running(settings, jobs, files, registry, backend))
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        server.thread.join()


if __name__ == "__main__":
    main()
