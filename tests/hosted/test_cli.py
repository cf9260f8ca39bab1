"""The hosted route at the command line: consent, what goes to stdout, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosted.fake import KEY, Failure, Fake


def tunery(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunery.cli", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
        check=False,
    )


@pytest.fixture
def quick(fake: Fake) -> Fake:
    """A server whose jobs are soon done: the pauses between looks are real ones here."""
    fake.statuses = ("running", "running", "succeeded")
    return fake


def test_check_tells_the_cost_and_sends_nothing(project: Path, quick: Fake) -> None:
    done = tunery("check", "task.yaml", cwd=project)
    assert done.returncode == 0, done.stderr
    for words in ("gpt-4.1-mini at http://127.0.0.1", "about 1,216 tokens", "⟦good⟧", "hosted.prices can name one"):
        assert words in done.stdout
    own = tunery("check", "task.yaml", "--json", cwd=project, OPENAI_BASE_URL="https://api.openai.com/v1")
    estimate = json.loads(own.stdout)["hosted"]["estimate"]
    assert estimate["training_cost"] == pytest.approx(1216 * 5 / 1e6)
    assert quick.requests == []


def test_training_asks_first_and_prints_results_on_stdout(project: Path, quick: Fake) -> None:
    refused = tunery("train", "task.yaml", cwd=project)
    assert refused.returncode == 2
    assert "nobody could be asked" in refused.stderr
    assert "32 training rows" in refused.stderr
    assert quick.requests == []
    done = tunery("train", "task.yaml", "--yes", cwd=project)
    assert done.returncode == 0, done.stderr
    for words in (
        "accuracy",
        "100.0%",
        "Receipt",
        "billed    1,216 tokens",
        "runs/films/report.html",
        "ft:gpt-4.1-mini",
    ):
        assert words in done.stdout
    assert "step 8/8" in done.stderr
    assert "step 8/8" not in done.stdout
    assert KEY not in done.stdout + done.stderr
    again = tunery("eval", "runs/films", "--json", "--quiet", cwd=project)
    assert json.loads(again.stdout)["tuned"]["accuracy"] == 1.0
    cancelled = tunery("train", "task.yaml", "--cancel", cwd=project)
    assert "cancelled" in cancelled.stdout


def test_a_refusal_has_its_own_exit_code(project: Path, quick: Fake) -> None:
    quick.failures.append(Failure("POST", "/fine_tuning/jobs", status=403, code="training_not_available"))
    done = tunery("train", "task.yaml", "--yes", cwd=project)
    assert done.returncode == 69
    assert "2027-01-06" in done.stderr
    assert "Traceback" not in done.stderr
    no_key = tunery("train", "task.yaml", "--yes", cwd=project, OPENAI_API_KEY="", OPENAI_BASE_URL="")
    assert no_key.returncode == 2
    assert "OPENAI_API_KEY is not set" in no_key.stderr


def test_migrate_says_what_it_needs(project: Path, quick: Fake) -> None:
    for arguments, words in (
        (["migrate", "ftjob-none", "--capture-only", "--yes"], "does not know it"),
        (["migrate", "ftjob-x", "--to", "x", "--base-url", "nonsense"], "--base-url"),
    ):
        done = tunery(*arguments, cwd=project)
        assert done.returncode in (2, 69), done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
