"""`tunery runs prune`: what finished runs no longer need is removed, and adapters never are."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from tunery.errors import ConfigError, TuneryError
from tunery.evaluation.runs import RUNS, folder_bytes, run_folders, summary
from tunery.paths import RunPaths, lock, run_lock
from tunery.records.run_summary import KeptPath, PrunedPath, Pruning
from tunery.task_file import load_task

_LEFTOVER = re.compile(r"\..+\.(?:tmp|old)-(\d+)")
"""What a process that was killed while it wrote leaves behind; the number is the process's."""

_PRUNED: tuple[str, ...] = ("finished", "not evaluated")
"""States in which nothing resumes from a checkpoint."""


def plan_pruning(folder: str | Path = RUNS) -> Pruning:
    """What would be removed: checkpoints of runs that are trained, and leftovers of processes that were killed.

    Checkpoints that another run in the folder starts from (lora.start) are kept.

    Raises:
        ConfigError: there is no such folder.
    """
    folder = Path(folder)
    runs = run_folders(folder)
    started_from = list(_started_from(runs))
    removed: list[PrunedPath] = []
    kept: list[KeptPath] = []
    for run in runs:
        checkpoints, state = RunPaths(run).checkpoints, summary(run)
        if checkpoints.is_dir():
            reason = _reason_to_keep(checkpoints, state.state, started_from)
            if reason:
                kept.append(KeptPath(path=str(checkpoints), reason=reason))
            else:
                removed.append(_pruned(checkpoints, "checkpoints of a run that is trained"))
    removed += [_pruned(each, "left by a process that was killed") for each in _leftovers([folder, *runs])]
    return Pruning(removed=removed, kept=kept, bytes=sum(each.bytes for each in removed), dry_run=True)


def prune(plan: Pruning) -> Pruning:
    """Remove what a plan names; a run that somebody works in by now is kept.

    Raises:
        ConfigError: something cannot be removed.
    """
    removed: list[PrunedPath] = []
    kept = list(plan.kept)
    for each in plan.removed:
        path = Path(each.path)
        try:
            if path.name == RunPaths(path.parent).checkpoints.name:
                with lock(run_lock(path.parent)):
                    _remove(path)
            else:
                _remove(path)
        except ConfigError as error:
            kept.append(KeptPath(path=each.path, reason=error.message))
        else:
            removed.append(each)
    return Pruning(removed=removed, kept=kept, bytes=sum(each.bytes for each in removed), dry_run=False)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be removed: {error.strerror}", "check its permissions") from None


def _pruned(path: Path, what: str) -> PrunedPath:
    return PrunedPath(path=str(path), bytes=folder_bytes(path), what=what)


def _reason_to_keep(checkpoints: Path, state: str, started_from: list[Path]) -> str:
    if state not in _PRUNED:
        return f"the run is {state}"
    if any(start.is_relative_to(checkpoints.resolve()) for start in started_from):
        return "another run starts from one of them (lora.start)"
    return ""


def _started_from(runs: list[Path]) -> Iterator[Path]:
    for run in runs:
        try:
            start = load_task(RunPaths(run).task).lora.start
        except TuneryError:  # of another version, or damaged: `tunery runs` says so
            continue
        if start is not None:
            yield Path(start).resolve()


def _leftovers(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        for entry in sorted(folder.iterdir()) if os.access(folder, os.R_OK) else ():
            found = _LEFTOVER.fullmatch(entry.name)
            if found and not psutil.pid_exists(int(found[1])):
                yield entry
