"""What a run says on its way. One protocol for the console, a server's job and whoever watches from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from tunery.jsonl import JsonMapping

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


class Progress(Protocol):
    """Told what happens, as it happens; never changes what it watches. `tunery.console.Console` is the usual one."""

    def note(self, note: Note) -> None:
        """Something for the user."""

    def start(self, total: int, done: int) -> None:
        """A run of `total` steps begins, `done` of them behind it."""

    def log(self, line: JsonMapping) -> None:
        """A line of metrics.jsonl."""

    def close(self) -> None:
        """The run has ended, well or not; perhaps before `start`."""
