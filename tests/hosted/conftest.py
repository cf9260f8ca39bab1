"""A stand-in server, a key for it, and no waiting."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosted.fake import KEY, MODEL, Fake, serving
from tunery.config_hosted import HostedConfig
from tunery.hosted import client as client_module
from tunery.hosted.client import Service
from tunery.progress import Note


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, in seconds; they take no time."""
    made: list[float] = []
    monkeypatch.setattr(client_module, "sleep", made.append)
    return made


@pytest.fixture
def fake(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A server that answers at $OPENAI_BASE_URL to the key in $OPENAI_API_KEY."""
    with serving(Fake()) as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.address)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.delenv("TUNERY_PRICES", raising=False)
        yield running


class Said(list[str]):
    """Notes as people read them."""

    def append(self, note: object) -> None:
        super().append(str(note))


@pytest.fixture
def notes() -> Said:
    """What a service said while it tried again."""
    return Said()


@pytest.fixture
def service(fake: Fake, notes: Said) -> Service:
    """The stand-in, as the code under test sees it."""
    return Service(HostedConfig(), notes.append)


def film(number: int) -> tuple[str, str]:
    """A review and its label."""
    return f"film {number} is {'fine' if number % 2 else 'dull'}", "good" if number % 2 else "bad"


def write_task(folder: Path) -> None:
    """A classification task for the stand-in: 40 rows, of which 8 are held out."""
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(film(number) for number in range(40))
    (folder / "task.yaml").write_text(
        f"name: films\nmodel: openai:{MODEL}\ndata:\n  train: rows.csv\n  validation: 8\n  instruction: good or bad?\n"
        "train:\n  epochs: 2\n  batch_size: 8\n"
    )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task and its rows, which is the current one."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path)
    return tmp_path


class Watching:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.started: tuple[int, int] | None = None
        self.closed = False

    def note(self, note: Note) -> None:
        self.said.append(str(note))

    def start(self, total: int, done: int) -> None:
        self.started = (total, done)

    def log(self, line: Any) -> None:
        self.lines.append(dict(line))

    def close(self) -> None:
        self.closed = True


def write_chats(path: Path, numbers: range) -> Path:
    """Conversations about films, in OpenAI's form."""
    with path.open("w") as file:
        for number in numbers:
            text, label = film(number)
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
