"""What a run says on its way. One protocol for the console, a server's job and whoever watches from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True, slots=True)
class Note:
    """Something said on the way.

    Attributes:
        message: what is, as a sentence.
        level: "warn" asks for attention, though the run goes on.
        code: for programs: what kind of note it is, such as "overfit"; "progress" for all that need not be told apart.
        hint: what to do, in words that hold wherever the run was started.
        command: the same as options of the command line, for those who started it there.
    """

    message: str
    level: Level = "info"
    code: str = "progress"
    hint: str | None = None
    command: str | None = None

    def __str__(self) -> str:
        advice = ": ".join(filter(None, (self.hint, self.command)))
        return f"{self.message} → {advice}" if advice else self.message


Say = Callable[[Note], None]
"""Where notes go."""


class Watcher(Protocol):
    """Told what happens, as it happens; never changes the run."""

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""

    def note(self, note: Note) -> None:
        """Something for the user."""


class View(Watcher, Protocol):
    """A Watcher that also shows how far a run is."""

    def start(self, total: int, done: int) -> None:
        """A run of `total` steps begins, `done` of them behind it."""

    def close(self) -> None:
        """The run has ended, well or not."""
