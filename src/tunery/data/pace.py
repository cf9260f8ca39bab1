"""How far reading and tokenising have come, said now and then while they last."""

from __future__ import annotations

import time

from tunery.progress import Note, Say

FIRST_SECONDS = 3.0
"""Work that is done sooner says nothing."""

EVERY_SECONDS = 5.0


class Pace:
    """Says how far a piece of work is.

    Args:
        say: where notes go; None for nowhere.
        doing: what is done, such as "reading rows".
    """

    def __init__(self, say: Say | None, doing: str) -> None:
        self._say, self._doing = say, doing
        self._next = time.monotonic() + FIRST_SECONDS

    def at(self, done: int, of: int | None = None) -> None:
        """So many are done; of how many, where that is known."""
        if self._say is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY_SECONDS
        self._say(Note(f"{self._doing}: {done:,}" + ("" if of is None else f" of {of:,}")))
