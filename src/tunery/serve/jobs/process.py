"""The process that works on a job, seen from the server."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from tunery.serve.jobs.job_folder import JobFolder

LOG_LINES = 15
"""Lines of the log that an error shows."""


class Worker:
    """A worker, started in a session of its own, so that a Ctrl-C meant for the server does not reach it.

    Args:
        validating: it looks at the job's files instead of training.
        python: the interpreter.
    """

    def __init__(self, job_id: str, folder: JobFolder, *, validating: bool, python: str = sys.executable):
        self.job_id, self.folder, self.validating = job_id, folder, validating
        self.asked_to_stop: float | None = None
        # -P: the current folder, which may be anyone's, is not a place to import from
        command = [python, "-P", "-m", "tunery.serve.jobs.worker", str(folder.root.resolve())]
        with open(folder.log, "ab") as log:
            self._process = subprocess.Popen(
                [*command, "--validate"] if validating else command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it lives; negative: the signal that ended it."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Ask it to write a checkpoint and end. Asking again changes nothing."""
        if self.asked_to_stop is None:
            self.asked_to_stop = time.monotonic()
            self.let_go()

    def let_go(self) -> None:
        """Close its standard input, which is how it is asked to stop."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def kill(self) -> None:
        """End it at once. What it did since its last checkpoint is lost."""
        self._process.kill()


def is_locked(folder: JobFolder) -> bool:
    """Whether a worker of this job lives, perhaps one that an earlier server has started."""
    try:
        with FileLock(folder.lock).acquire(blocking=False):
            return False
    except Timeout:
        return True


def describe_exit(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"{name}, perhaps for running out of memory" if name == "SIGKILL" else name
    return f"signal {-code}"


def last_lines(log: Path, lines: int = LOG_LINES) -> str:
    """The end of a worker's log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
