"""`make demo-api`: starts `tunery serve`, runs openai_script.py against it with OPENAI_BASE_URL set, and stops it.

python examples/demo_api.py TRAIN.jsonl VALIDATION.jsonl
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

SERVER = [sys.executable, "-m", "tunery.cli", "serve", "--base", "smollm2-135m-instruct"]
ALIAS = "gpt-4o-mini=smollm2-135m-instruct"
HOME = "runs/demo-api"
SCRIPT = Path(__file__).parent / "openai_script.py"
PATIENCE = 120
"""Seconds that the server may take to load its base."""


def free_port() -> int:
    """A port of the loopback address that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(server: subprocess.Popen[bytes], address: str) -> None:
    """Until the server answers."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if server.poll() is not None:
            sys.exit(f"the server ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit(f"the server did not answer within {PATIENCE} seconds")


def main() -> None:
    """Start, run, stop."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([*SERVER, "--alias", ALIAS, "--port", str(port), "--home", HOME])
    try:
        wait_for(server, address)
        command = [sys.executable, str(SCRIPT), *sys.argv[1:]]
        print(f"$ OPENAI_BASE_URL={address}/v1 python {SCRIPT.name} {' '.join(sys.argv[1:])}", flush=True)
        environment = {**os.environ, "OPENAI_BASE_URL": f"{address}/v1"}
        code = subprocess.run(command, env=environment, check=False).returncode
    finally:
        server.terminate()
        server.wait(timeout=60)
    sys.exit(code)


if __name__ == "__main__":
    main()
