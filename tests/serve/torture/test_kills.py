"""Server and worker are killed at random moments, and the job ends with the adapter it would have had.

$TUNERY_KILLS says how often (2; `make torture`: 20), $TUNERY_KILLS_SEED when.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import tunery
from tests.serve.torture.drive import STEPS
from tunery.console import Console
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.records import Checkpoint, Event, Job
from tunery.serve.store import Store
from tunery.task_file import load_task
from tunery.training.checkpoint import checkpoint_steps

KILLS = int(os.environ.get("TUNERY_KILLS", "2"))
SEED = int(os.environ.get("TUNERY_KILLS_SEED", "0"))
LONGEST_WAIT = 10.0
"""Seconds from one kill to the next, at most: about what a job of the driver takes from its start to its end."""
WORKER_DEATHS = 2
"""Deaths of the worker alone, in a row without a new checkpoint, that are dealt: one more and the job would fail."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.tiny import save_tiny_llama

    return str(save_tiny_llama(tmp_path_factory.mktemp("base")))


class Victim:
    """A server process and its worker."""

    def __init__(self, home: Path, base: str):
        command = [sys.executable, "-m", "tests.serve.torture.drive", str(home), base]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)

    def workers(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "tunery.serve.jobs.worker" in child.cmdline()]
        return []

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by itself within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def victims() -> Iterator[list[Victim]]:
    """All servers that were started; none outlives the test."""
    started: list[Victim] = []
    yield started
    for victim in started:
        workers = victim.workers()
        victim.kill()
        if victim.process.stdout:
            victim.process.stdout.close()
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.kill()


def kill_at_random(home: Path, base: str, victims: list[Victim]) -> dict[str, int]:
    """Deal KILLS kills, restarting what is dead; then let the last job end. Returns what was killed how often."""
    dice, dealt = random.Random(SEED), {"server": 0, "worker": 0, "both": 0}
    victim, deaths, step = start(home, base, victims), 0, 0
    while sum(dealt.values()) < KILLS:
        if victim.wait(dice.uniform(0.2, LONGEST_WAIT)):  # a job is done: on with another
            assert victim.process.returncode == 0
            victim, deaths, step = start(home, base, victims), 0, 0
            continue
        now = max((step_of(folder) for folder in (home / "jobs").glob("ftjob-*")), default=0)
        deaths = 0 if now > step else deaths
        step = now
        workers = victim.workers()
        target = dice.choice(["server", "worker", "both"] if workers and deaths < WORKER_DEATHS else ["server"])
        if target in ("worker", "both"):
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGKILL)
        if target in ("server", "both"):
            victim.kill()
            victim = start(home, base, victims)
        deaths = deaths + 1 if target == "worker" else deaths
        dealt[target] += 1
    assert victim.wait(300)
    assert victim.process.returncode == 0
    return dealt


def start(home: Path, base: str, victims: list[Victim]) -> Victim:
    victims.append(Victim(home, base))
    return victims[-1]


def step_of(folder: Path) -> int:
    steps = checkpoint_steps(JobFolder(folder).run.checkpoints)
    return steps[-1] if steps else 0


@pytest.mark.torture
def test_kills_at_random_moments_change_no_byte_of_the_adapter(
    tmp_path: Path, base: str, victims: list[Victim]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    started = time.monotonic()
    dealt = kill_at_random(home, base, victims)
    sys.stderr.write(f"killed {dealt}, in {time.monotonic() - started:.0f} s\n")
    store = Store(home / "server.sqlite3")
    jobs = store.list(Job).data
    assert jobs
    task = load_task(JobFolder(home / "jobs" / jobs[0].id).task)
    whole = tunery.train(task.model_copy(update={"output": str(tmp_path / "whole")}), progress=Console(quiet=True))
    expected = (whole.path / "adapter" / "adapter_model.safetensors").read_bytes()
    for job in jobs:
        assert job.status == "succeeded"
        folder = JobFolder(home / "jobs" / job.id)
        assert (folder.run.adapter / "adapter_model.safetensors").read_bytes() == expected
        events = store.list(Event, owner=job.id, order="asc").data
        steps = [event.data["step"] for event in events if event.type == "metrics" and event.data]
        assert sorted(steps) == list(range(1, STEPS + 1))  # each once
        validated = [event.data for event in events if event.data and "valid_loss" in event.data]
        assert len(validated) == 10
        listed = {checkpoint.step_number for checkpoint in store.list(Checkpoint, owner=job.id).data}
        assert listed == set(checkpoint_steps(folder.run.checkpoints))
        assert [event.message for event in events].count("The job has successfully completed") == 1
