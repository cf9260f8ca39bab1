"""The inside of a small server for tests: store, files, registry and jobs over one folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunery.serve.files import Files
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.jobs.service import Jobs
from tunery.serve.records import FINAL, Event, Job
from tunery.serve.registry import Registry
from tunery.serve.schemas import CreateJob
from tunery.serve.store import Store

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
PATIENCE = 120.0


@dataclass
class World:
    """Everything of a server but its HTTP.

    Attributes:
        base: the one base model, a name or a folder.
        python: the workers' interpreter.
    """

    home: Path
    base: str
    python: str = sys.executable
    slots: int = 1
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store(self.home / "server.sqlite3")
        self.files = Files(self.home / "files", self.store)
        self.registry = Registry(self.store, self.home / "jobs", [self.base], {"gpt-4o-mini": self.base})
        self.jobs = Jobs(
            self.home,
            self.store,
            self.files,
            self.registry,
            slots=self.slots,
            task_defaults=self.defaults,
            python=self.python,
        )

    def __enter__(self) -> World:
        self.jobs.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.jobs.stop()
        self.store.close()

    def upload(self, rows: Iterable[Any], name: str = "rows.jsonl") -> str:
        """The id of a new file of JSON lines."""
        content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        return self.files.upload([content.encode()], name, "fine-tune").id

    def create(self, training_file: str, **fields: Any) -> Job:
        """A new job, as POST /v1/fine_tuning/jobs makes it."""
        given = {"model": self.base, "training_file": training_file, **fields}
        return self.jobs.create(CreateJob.model_validate(given))

    def folder(self, job: Job) -> JobFolder:
        """Of a job."""
        return self.jobs.folder(job.id)

    def wait(self, job: Job, *statuses: str, patience: float = PATIENCE) -> Job:
        """The job, once it has one of these statuses. It must not come to another end before."""
        deadline = time.monotonic() + patience
        while (now := self.jobs.get(job.id)).status not in statuses:
            assert now.status not in FINAL, f"{now.status}: {now.error}"
            assert time.monotonic() < deadline, f"still {now.status}\n{self.log(job)}"
            time.sleep(0.02)
        return now

    def messages(self, job: Job) -> list[str]:
        """What the job's events say, the oldest first."""
        return [event.message for event in self.events(job)]

    def events(self, job: Job) -> list[Event]:
        """The job's events, the oldest first, fetched in pages."""
        events: list[Event] = []
        after = None
        while True:
            page = self.jobs.events(job.id, after, limit=7)
            events += page.data
            if not page.has_more:
                return events[::-1]
            after = page.last_id

    def log(self, job: Job) -> str:
        """What the job's workers printed."""
        log = self.folder(job).log
        return log.read_text(errors="replace") if log.exists() else ""


def fake_world(home: Path, *, validate: str | list[str] = "ok", train: str | list[str] = "ok", **more: Any) -> World:
    """A world whose workers do at once what they are told (fake_worker.py)."""
    home.mkdir(exist_ok=True)
    plan = {"validate": [validate] if isinstance(validate, str) else validate}
    plan["train"] = [train] if isinstance(train, str) else train
    (home / "fake.json").write_text(json.dumps(plan))
    return World(home, "a-base", python=str(FAKE_WORKER), **more)


def until(happened: Callable[[], Any], patience: float = PATIENCE) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def chat_row(number: int) -> dict[str, Any]:
    """A conversation that a tiny model can learn."""
    words = ("fine", "dull", "best")
    return {
        "messages": [
            {"role": "user", "content": f"film {number}?"},
            {"role": "assistant", "content": words[number % len(words)]},
        ]
    }


def chat_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Conversations, each other than the others."""
    return [chat_row(number) for number in range(start, start + count)]


def pair_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Pairs of answers in OpenAI's form."""
    things = ("film", "answer", "day", "system", "user", "best")
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"how is {things[n % 6]} {n}?"}]},
            "preferred_output": [{"role": "assistant", "content": f"the {things[n % 6]} is good"}],
            "non_preferred_output": [{"role": "assistant", "content": f"a dull {things[n % 6]}, the best of films"}],
        }
        for n in range(start, start + count)
    ]
