"""Answers and training of one `tunery serve`: the speed of each alone, and of both at the same time."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from bench import plan
from bench.neighbours import ANSWER_TOKENS, CLIENTS
from bench.run import say
from bench.workloads import imdb

ROWS = 400
SECONDS = 45.0
"""Each speed is measured over so long."""

PATIENCE = 300.0


def measure_serving(home: Path) -> dict[str, Any]:
    """{"answers_alone", "answers_beside"} in tokens/s, {"training_alone", "training_beside"} in steps/min."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    with serving(home) as client:
        answers(client, 5.0)  # warm up
        found = {"answers_alone": answers(client, SECONDS)}
        say(f"  answers alone: {found['answers_alone']:.0f} tokens/s")
        job = client.fine_tuning.jobs.create(model=plan.MODEL, training_file=upload(client, home))
        training(client, job.id, 1.0)
        found["training_alone"] = training(client, job.id, SECONDS)
        say(f"  training alone: {found['training_alone']:.1f} steps/min")
        result: list[float] = []
        asking = threading.Thread(target=lambda: result.append(answers(client, SECONDS)))
        asking.start()
        found["training_beside"] = training(client, job.id, SECONDS)
        asking.join()
        found["answers_beside"] = result[0]
        say(f"  both: {found['answers_beside']:.0f} tokens/s and {found['training_beside']:.1f} steps/min")
        client.fine_tuning.jobs.cancel(job.id)
    return found


@contextmanager
def serving(home: Path) -> Iterator[OpenAI]:
    """A server of its own, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tunery.cli", "serve", "--base", plan.MODEL, "--port", str(port), "--home", home]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=plan.ROOT, stdout=log, stderr=log)
    try:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise SystemExit(f"the server does not answer: see {home / 'server.log'}")
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0, timeout=PATIENCE)
    finally:
        server.terminate()
        server.wait(60)


def upload(client: OpenAI, home: Path) -> str:
    """Film reviews cut to their first sentences, to be continued: its file id."""
    lines = []
    for text in imdb(ROWS):
        first, _, rest = text.partition(". ")
        words = " ".join(re.split(r"\s+", rest)[:60]) or "…"
        messages = [{"role": "user", "content": f"Go on: {first}."}, {"role": "assistant", "content": words}]
        lines.append(json.dumps({"messages": messages}))
    file = home / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with file.open("rb") as stream:
        return client.files.create(file=stream, purpose="fine-tune").id


def answers(client: OpenAI, seconds: float) -> float:
    """Tokens/s answered by the base to CLIENTS clients, each asking again as soon as it is answered."""
    counts, until = [0] * CLIENTS, time.perf_counter() + seconds

    def ask(number: int) -> None:
        turn = 0
        while time.perf_counter() < until:
            turn += 1
            stream = client.chat.completions.create(
                model=plan.MODEL,
                messages=[{"role": "user", "content": f"Tell me a story about the number {number * 1000 + turn}."}],
                max_tokens=ANSWER_TOKENS,
                stream=True,
            )
            for chunk in stream:
                if time.perf_counter() > until:
                    stream.close()
                    break
                counts[number] += bool(chunk.choices and chunk.choices[0].delta.content)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def training(client: OpenAI, job: str, seconds: float) -> float:
    """Steps/min of a running job, over those that end within this time, at least two."""
    started = time.perf_counter()
    while True:
        status = client.fine_tuning.jobs.retrieve(job)
        if status.status in ("failed", "cancelled", "succeeded"):
            raise SystemExit(f"the job is {status.status}: {status.error}")
        seen = [moment for moment in _steps(client, job) if moment >= started]
        if len(seen) >= 3 and time.perf_counter() - started >= seconds:
            return 60.0 * (len(seen) - 1) / (seen[-1] - seen[0])
        if time.perf_counter() - started > PATIENCE:
            raise SystemExit("the job takes no steps")
        time.sleep(0.25)


_seen: dict[tuple[str, int], float] = {}
"""When a step of a job was first heard of."""


def _steps(client: OpenAI, job: str) -> list[float]:
    """When each of the job's latest steps was first heard of."""
    now = time.perf_counter()
    events = client.fine_tuning.jobs.list_events(job, limit=50).data
    numbers = [int(e.data["step"]) for e in events if e.type == "metrics" and isinstance(e.data, dict)]
    return [_seen.setdefault((job, number), now) for number in sorted(numbers)]
