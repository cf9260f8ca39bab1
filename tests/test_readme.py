"""The README's commands, run as they stand there, on the real model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def commands() -> list[str]:
    """The `tunery …` lines of the README's code blocks, without their comments."""
    lines = re.findall(r"^    (tunery .+?)(?:\s{2,}#.*)?$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert [line.split()[1] for line in lines] == [
        "init",
        "check",
        "train",
        "eval",
        "predict",
        "runs",
        "settings",
        "doctor",
        "chat",
        "export",
        "serve",
    ]
    return lines


def test_the_readmes_commands_run_as_they_stand_there(tmp_path: Path, smollm2: str) -> None:
    for command in commands()[:-1]:
        done = subprocess.run(
            [sys.executable, "-m", "tunery.cli", *command.split()[1:]],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            input="I was charged twice.\n/base\nI was charged twice.\n/quit\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "warning" not in done.stderr.casefold(), done.stderr
    left = {path.name for path in (tmp_path / "runs" / "my-task").iterdir()}
    promised = set(re.findall(r"^      ([a-z.]+)/? {2,}", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert {
        "task.yaml",
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "evaluation.json",
        "receipt.json",
        "report.html",
    } <= left
    assert left <= promised | {"checkpoints", "adapter", "export"}


def test_the_readmes_server_starts_and_answers(tmp_path: Path, smollm2: str) -> None:
    command = [sys.executable, "-m", "tunery.cli", *commands()[-1].split()[1:], "--port", "0"]  # 8000 may be taken
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TUNERY_HOME": str(tmp_path / "home")}
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        said = next(line for line in server.stderr if "OPENAI_BASE_URL=" in line)
        with urllib.request.urlopen(f"{said.partition('=')[2].strip()}/models", timeout=30) as answer:
            assert "gpt-4o-mini" in answer.read().decode()
    finally:
        server.terminate()
        assert server.wait(60) in (0, -15)  # uvicorn stops in good order, then ends as the signal says
        server.stderr.close()
