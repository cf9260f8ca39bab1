"""A command at a terminal of its own: what a person types, and what they see."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

CTRL_C, CTRL_D = "\x03", "\x04"
PATIENCE = 120.0
"""Seconds until what should appear is given up."""


_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)
"""In the child: only a process whose terminal it is gets its Ctrl-C."""


class Terminal:
    """`tunery ARGUMENTS` in a child process whose stdin, stdout and stderr are one terminal.

    Attributes:
        seen: everything that was printed so far.
    """

    def __init__(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]):
        self.seen = ""
        self._read = 0
        self._terminal, child = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, "-m", "tunery", *arguments],
            **dict.fromkeys(("stdin", "stdout", "stderr"), child),
            cwd=cwd,
            env={**os.environ, **env},
            start_new_session=True,
        )
        os.close(child)

    def type(self, keys: str) -> None:
        """Press keys, no sooner than a person could."""
        time.sleep(0.2)  # Python misses a Ctrl-C between writing its prompt and waiting for a line
        os.write(self._terminal, keys.encode())

    def expect(self, pattern: str) -> str:
        """Wait until a regular expression matches what is printed after the last match; what was printed until then."""
        end = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.seen[self._read :])) is None:
            assert self._more(), f"it ended before {pattern!r}:\n{self.seen}"
            assert time.monotonic() < end, f"{pattern!r} did not come:\n{self.seen}"
        until = self.seen[self._read : self._read + found.end()]
        self._read += found.end()
        return until

    def wait(self) -> int:
        """Read until it ends; its exit code, negative for a signal."""
        end = time.monotonic() + PATIENCE
        while self._more():
            assert time.monotonic() < end, f"it did not end:\n{self.seen}"
        return self._process.wait(PATIENCE)

    def _more(self) -> bool:
        """Read for a moment; whether there may be more."""
        if not select.select([self._terminal], [], [], 0.2)[0]:
            return True
        try:
            piece = os.read(self._terminal, 65536)
        except OSError:  # under Linux the end of a terminal is an error
            piece = b""
        self.seen += piece.decode(errors="replace")
        return bool(piece)

    def close(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


@contextmanager
def terminal(arguments: Sequence[str], cwd: Path, **env: str) -> Generator[Terminal]:
    """A command at a terminal; it is ended on the way out."""
    opened = Terminal(
        arguments, cwd, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200", **env}
    )
    try:
        yield opened
    finally:
        opened.close()
