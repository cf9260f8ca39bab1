"""Runs tunery and a peer in turn, step by step, each in a process of its own, and records what they say.

Working in turn, both meet the same drift of the machine, so the ratio of neighbouring steps is the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plan
from bench.environments import EnvironmentFailed, python_of

START_SECONDS = 600.0
STEP_SECONDS = 1200.0
"""A peer that says nothing for so long is given up."""

Run = dict[str, Any]
"""What a process said: {"startup_seconds", "versions", "trainable", "steps": […]} or {"failed": why}."""


class PeerFailed(Exception):
    """A peer ended or fell silent; the message is for the report."""


class Process:
    """A peer at work (bench.peers.common.Lines is its side of the conversation)."""

    def __init__(
        self,
        peer: plan.Peer,
        folder: Path,
        threads: int,
        *extra: str,
        gpu: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.peer, self.log = peer, folder / f"{peer.name}.log"
        self.started = time.perf_counter()
        command = [
            python_of(peer.environment),
            "-m",
            f"bench.peers.{peer.module}",
            str(folder),
            *peer.arguments,
            *extra,
        ]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                cwd=plan.ROOT,
                env=_environment(threads, not peer.environment, gpu) | dict(environment or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.run: Run = {"steps": []}

    def ready(self) -> None:
        """Wait until everything is loaded."""
        line = self._read(START_SECONDS)
        self.run["startup_seconds"] = time.perf_counter() - self.started
        self.run |= {key: value for key, value in line.items() if key != "event"}

    def step(self) -> dict[str, Any]:
        """Let it train one batch."""
        stdin = self.process.stdin
        assert stdin is not None
        try:
            stdin.write(b"go\n")
            stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(self._why()) from None
        line = self._read(STEP_SECONDS)
        self.run["steps"].append({key: value for key, value in line.items() if key != "event"})
        return line

    def stop(self) -> None:
        """End the conversation, and the process."""
        if self.process.stdin and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def _read(self, seconds: float) -> dict[str, Any]:
        stdout = self.process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise PeerFailed(f"said nothing for {seconds:.0f} s ({self.log})")
        line = stdout.readline()
        if not line:
            raise PeerFailed(self._why())
        return json.loads(line)

    def _why(self) -> str:
        code = self.process.wait(30)
        if code < 0:
            return f"was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f"ended with code {code}: {lines[-1] if lines else 'no message'}"


def _environment(threads: int, own: bool, gpu: bool) -> dict[str, str]:
    """Variables of a peer's process: its threads, no network, a GPU if wanted; tunery's sources only for tunery."""
    given = dict(os.environ)
    given.update(
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        PYTHONUNBUFFERED="1",
    )
    if not gpu:
        given["CUDA_VISIBLE_DEVICES"] = ""
    if not own:
        given.pop("PYTHONPATH", None)
    return given


def compare(peer: plan.Peer | None, folder: Path, threads: int, repeats: int) -> dict[str, Any]:
    """tunery and a peer in turn on one workload: a step to warm up, then `repeats` timed ones.

    One that fails leaves the other to finish alone, and its reason in the record.
    """
    sides = [plan.TUNERY, *([peer] if peer else [])]
    runs = together(sides, folder, threads, repeats + 1)
    return {"tunery": runs[0], "other": runs[1] if peer else None}


def together(
    peers: Sequence[plan.Peer], folder: Path, threads: int, steps: int, *extra: str, gpu: bool = False
) -> list[Run]:
    """Let several peers take `steps` steps each, one after the other at every step."""
    processes: dict[int, Process] = {}
    runs: list[Run] = [{"steps": []} for _ in peers]
    try:
        for number, peer in enumerate(peers):
            try:
                processes[number] = Process(peer, folder, threads, *extra, gpu=gpu)
                runs[number] = processes[number].run
                processes[number].ready()
            except (PeerFailed, EnvironmentFailed) as error:
                _give_up(processes.pop(number, None), runs[number], peer, str(error))
        for _ in range(steps):
            for number, process in list(processes.items()):
                try:
                    line = process.step()
                    _say(
                        f"  {process.peer.title}: step {line['step']}, {line['seconds']:.1f} s, loss {line['loss']:.4f}"
                    )
                except PeerFailed as error:
                    _give_up(processes.pop(number), runs[number], process.peer, str(error))
    finally:
        for process in processes.values():
            process.stop()
    return runs


def _give_up(process: Process | None, run: Run, peer: plan.Peer, why: str) -> None:
    if process:
        process.stop()
    run["failed"] = why
    _say(f"  {peer.title}: {why}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
