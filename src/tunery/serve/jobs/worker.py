"""The process of one job: `python -m tunery.serve.jobs.worker FOLDER [--validate]`.

With --validate it looks at the job's files; else it trains, by the same `tunery.train` as everyone's. It is asked to
stop by the end of its standard input, which also comes when the server dies, or by SIGTERM: it then writes a checkpoint
and ends. What it has to say goes into files in the job's folder, which outlive the server: notes and the plan into
status.jsonl, numbers into the run's metrics.jsonl, and why it gives up into error.json. Exit codes: tunery.errors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tunery.config import Task
from tunery.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ModelError,
    NotInstalledError,
    ResumableError,
    StoppedError,
    TuneryError,
)
from tunery.jsonl import JsonMapping, append_lines
from tunery.paths import disk_errors
from tunery.progress import Note
from tunery.serve.jobs.job_folder import JobFolder, write_error

LOCK_SECONDS = 120
"""How long a worker waits for its predecessor, which may be writing its last checkpoint."""


class _BusyError(ResumableError):
    """Another process holds the job's lock."""


_CODES: tuple[tuple[type[TuneryError], str], ...] = (
    (DataError, "invalid_training_file"),
    (ModelError, "model_error"),
    (ConfigError, "invalid_configuration"),
    (AdapterError, "adapter_error"),
    (CheckpointError, "checkpoint_error"),
    (DivergedError, "training_diverged"),
    (_BusyError, "worker_busy"),
    (ResumableError, "disk_full"),
)
_HINTS: Mapping[str, str] = {
    "training_diverged": "try a smaller learning_rate_multiplier",
    "disk_full": "free some space on the server, and resume the job",
    "checkpoint_error": "start the job again",
}
"""Error code → what a client of the API can do; the hints of the errors themselves are for the command line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Work on the job whose folder is named; the exit code is tunery.errors'."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    folder, validating = JobFolder(Path(given[0])), "--validate" in given[1:]
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    try:
        with _lock(folder):
            folder.error.unlink(missing_ok=True)
            with disk_errors("the job's folder"):
                _validate(folder) if validating else _train(folder)
    except StoppedError as stopped:
        sys.stderr.write(f"{stopped.message}\n")
        return stopped.exit_code
    except TuneryError as error:
        sys.stderr.write(f"{error}\n")
        _say_why(folder, error)
        return error.exit_code
    except Exception as error:  # a bug of ours: the job fails and says so; the log has the details
        traceback.print_exc()
        with contextlib.suppress(TuneryError, OSError):
            write_error(folder, "server_error", f"an internal error ({type(error).__name__}); see worker.log", None)
        return TuneryError.exit_code
    return 0


def _stop_at_end_of_input() -> None:
    """Wait until standard input ends, then ask this process to stop as SIGTERM would."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def _lock(folder: JobFolder) -> Iterator[None]:
    """Hold the job's lock; it ends with this process, whatever ends it."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder.lock, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise _BusyError("another process is still working on this job", "resume the job later") from None


def _say_why(folder: JobFolder, error: TuneryError) -> None:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "server_error")
    own = error.hint if error.hint and "--" not in error.hint and not isinstance(error, NotInstalledError) else None
    hint = _HINTS.get(code) or own
    message = error.message if hint is None else f"{error.message}. What helps: {hint}"
    param = error.param or ("training_file" if isinstance(error, DataError) else None)
    with contextlib.suppress(TuneryError, OSError):  # a full disk has no room for its own report either
        write_error(folder, code, without_paths(message, folder), param)


def without_paths(text: str, folder: JobFolder) -> str:
    """A message without the places of the job's files on the server."""
    return text.replace(f"{folder.root}{os.sep}", "").replace(str(folder.root), "the job")


def _validate(folder: JobFolder) -> None:
    from tunery.serve.jobs.validate import validate

    validate(folder)


def _train(folder: JobFolder) -> None:
    from tunery.startup import collector_paused

    with collector_paused():
        from tunery.api import train
        from tunery.serve.jobs.translate import JobSpec
        from tunery.task_file import load_task

    os.environ.update(JobSpec.read(folder).environment)
    _remove_leftovers(folder)
    task = load_task(folder.task)
    train(task, progress=StatusProgress(folder, task))


def _remove_leftovers(folder: JobFolder) -> None:
    """Remove half-written folders and files of workers that were killed (tunery.paths names them so)."""
    for place in (folder.root, folder.run.root, folder.run.checkpoints):
        for leftover in (*place.glob(".*.tmp-*"), *place.glob(".*.old-*")):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


class StatusProgress:
    """Writes what the run says into status.jsonl, for the server to read.

    Lines: {"kind": "plan", "total", "done", "eval_every", "at"} and {"kind": "note", "text", "level", "at"}.

    `eval_every` is null where nothing is validated.
    """

    def __init__(self, folder: JobFolder, task: Task):
        self._folder, self._task = folder, task

    def start(self, total: int, done: int) -> None:
        """A run of `total` steps begins, `done` of them behind it."""
        from tunery.training.plan import validation_every

        every = validation_every(self._task.train, total) if self._task.data.validation is not None else None
        self._write(kind="plan", total=total, done=done, eval_every=every)

    def note(self, note: Note) -> None:
        """Something for the user, without options of a command line that was not theirs."""
        text = without_paths(str(replace(note, command=None)), self._folder)
        self._write(kind="note", text=text, level=note.level)

    def log(self, line: JsonMapping) -> None:
        """A line of metrics.jsonl, where the server finds it."""

    def close(self) -> None:
        """The run has ended."""

    def _write(self, **line: object) -> None:
        append_lines(self._folder.status, [{**line, "at": time.time()}])


if __name__ == "__main__":
    sys.exit(main())
