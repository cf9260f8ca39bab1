"""Where things lie on disk, and writing that is whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import ConfigError, ResumableError


@dataclass(frozen=True)
class RunPaths:
    """The layout of a run directory: the product of training, and all that later steps read."""

    root: Path

    @property
    def task(self) -> Path:
        return self.root / "task.yaml"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def predictions(self) -> Path:
        """What both models say of each held-out row."""
        return predictions_beside(self.evaluation)

    @property
    def receipt(self) -> Path:
        return self.root / "receipt.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def hosted_state(self) -> Path:
        """Where a hosted run stands (tunery.records.hosted_state)."""
        return self.root / "hosted.json"

    @property
    def events(self) -> Path:
        """What the server said of a hosted run's job."""
        return self.root / "events.jsonl"

    @property
    def results(self) -> Path:
        """A hosted run's metrics as the server keeps them."""
        return self.root / "results.csv"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"


def predictions_beside(evaluation: Path) -> Path:
    """The file of predictions that goes with evaluation.json (or evaluation-FILE.json)."""
    return evaluation.with_name(f"{evaluation.stem.replace('evaluation', 'predictions', 1)}.jsonl")


def cache_dir() -> Path:
    """`$TUNERY_CACHE`, else `$XDG_CACHE_HOME/tunery`, else `~/.cache/tunery`."""
    if own := os.environ.get("TUNERY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunery"


def safe_name(name: str) -> str:
    """A file name from any text: letters, digits, dot, dash and underscore; never empty, hidden or a parent folder."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")
    return cleaned[:100] or "run"


def sync_folder(folder: Path) -> None:
    """Make what was renamed in a folder survive a power cut."""
    if os.name == "nt":  # Windows cannot open a folder; its renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full disk or a read-only folder, met while writing `what`, into words and an exit code."""
    try:
        yield
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise ResumableError(
                f"the disk is full: {what} could not be written",
                "free some space and run the same command again; it resumes from the last checkpoint",
            ) from error
        if error.errno in (13, 30):  # EACCES, EROFS
            hint = "choose another folder with --set output=FOLDER"
            raise ConfigError(f"no permission to write {what}", hint) from error
        if error.errno in (17, 20):  # EEXIST, ENOTDIR
            hint = "choose another folder with --set output=FOLDER"
            raise ConfigError(f"{what} cannot be written: a file stands where a folder is needed", hint) from error
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that after a crash it holds the old content or the new, never a part (tmp, fsync, rename)."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(str(path)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError, ValueError: it cannot be read, or is no JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Atomic, two-space indented JSON; NaN and infinity are refused (they are not JSON)."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: `fill` writes into a temporary sibling, which then takes the name.

    An existing `target` is replaced; between the two renames it survives under a `.old-` name.
    """
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    retired = target.with_name(f".{target.name}.old-{os.getpid()}")
    with disk_errors(str(target)):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "r+b") as handle:  # Windows flushes only what is open for writing
                        os.fsync(handle.fileno())
            sync_folder(temporary)
            if target.exists():
                os.rename(target, retired)
            try:
                os.rename(temporary, target)
            except BaseException:
                if retired.exists():
                    os.rename(retired, target)
                raise
            sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def lock(path: Path, taken: str | None = None, hint: str | None = None) -> Iterator[None]:
    """Hold a file lock; a second process that wants the same run directory is refused at once.

    Args:
        taken, hint: what that process is told, where it is not about a run directory.

    The lock dies with its process, so a crash never leaves one behind.
    """
    from filelock import FileLock, Timeout

    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(path).acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                taken or f"another process is working in {path.parent}",
                hint or "wait for it, or give this run another name with --set name=NAME",
            ) from None
    with held:
        yield


def run_lock(run: Path) -> Path:
    """The lock of a run directory, beside it: the directory itself may get another name."""
    return run.with_name(f".{run.name}.lock")


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock now."""
    from filelock import FileLock, Timeout

    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # a read-only folder: nobody works there
        return False


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
