"""The folder of an export: whether it may be written, and that nothing half written stays, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

from tunery.errors import ConfigError, ResumableError, StoppedError, TuneryError
from tunery.paths import write_folder

RECORD = "export.json"
"""Written beside every export: what it is, how it was compared, and the hash of each of its files."""

_ELSEWHERE = "choose another folder with --out"


def check_target(target: Path, root: Path) -> None:
    """Refuse a folder that is not an export's to replace.

    Args:
        target: resolved.
        root: the run directory.

    Raises:
        ConfigError: it holds the run, this process's own folder, or anything that is no export.
    """
    here = Path.cwd().resolve()
    if target == here or target in here.parents:
        raise ConfigError(f"{target} is the folder you are in, or holds it; it is not replaced", _ELSEWHERE)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / RECORD).is_file())):
        raise ConfigError(f"{target} exists and holds no export; it is not replaced", _ELSEWHERE)
    if target == root.resolve() or target in root.resolve().parents:
        raise ConfigError(f"{target} holds the run itself", _ELSEWHERE)


def write_export(target: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write an export into a temporary folder, which then takes the name; or leave nothing.

    Raises:
        ResumableError: the disk is full.
        ConfigError: no permission.
    """
    sweep(target)
    try:
        write_folder(target, fill)
    except (ResumableError, ConfigError) as error:
        if isinstance(error.__cause__, OSError) and type(error) in _HINTS:
            error.hint = _HINTS[type(error)]
        raise


_HINTS: dict[type[TuneryError], str] = {
    ResumableError: f"nothing of it is kept; free some space and run the same command again, or {_ELSEWHERE}",
    ConfigError: _ELSEWHERE,
}
"""What to do about a disk; those who write files in general speak of runs."""


def sweep(target: Path) -> None:
    """Remove what killed exports left beside a target. One that had made way for its successor gets its name back."""
    for leftover in sorted(target.parent.glob(f".{target.name}.*-*")):
        match = re.fullmatch(r"\.(tmp|old)-(\d+)", leftover.name.removeprefix(f".{target.name}"))
        if match is None or psutil.pid_exists(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            os.rename(leftover, target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


class _Terminated(BaseException):
    """SIGTERM came. No error that somebody may handle."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within this context SIGTERM is an exception, so what is half written goes and programs that were started end.

    In a thread other than the main one signals cannot be caught.

    Raises:
        StoppedError: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # cleaning up is not to be cut short
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        raise StoppedError(
            "the export was terminated; nothing of it is kept",
            "run the same command again",
            signal_number=signal.SIGTERM,
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
