"""Run directories beside each other: a line for each, and what sets some of them apart."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunery.config import all_settings
from tunery.errors import CheckpointError, ConfigError, TuneryError
from tunery.evaluation.record import METRICS, as_number, pick
from tunery.jsonl import JsonMapping, JsonObject, is_object
from tunery.paths import RunPaths, is_locked, read_json, run_lock
from tunery.records.run_summary import ComparedMetric, RunComparison, RunState, RunSummary
from tunery.task_file import load_task
from tunery.text import did_you_mean

RUNS = Path("runs")
"""Where runs lie unless `output` says otherwise."""

_PRODUCTS = ("receipt", "metrics", "checkpoints", "hosted_state")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory: a task and something that a run leaves."""
    paths = RunPaths(folder)
    return paths.receipt.is_file() or (
        paths.task.is_file() and any(getattr(paths, name).exists() for name in _PRODUCTS)
    )


def run_folders(folder: Path) -> list[Path]:
    """The run directories in a folder, or the folder itself if it is one.

    Raises:
        ConfigError: there is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", "name the folder of your runs: tunery runs FOLDER")
    if is_run(folder):
        return [folder]
    try:
        inside = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}", "check its permissions") from None
    return [entry for entry in inside if entry.is_dir() and is_run(entry)]


def list_runs(folder: str | Path = RUNS) -> list[RunSummary]:
    """All runs of a folder, the newest last. Nothing is raised for what a run directory holds.

    Raises:
        ConfigError: there is no such folder.
    """
    found = [summary(entry) for entry in run_folders(Path(folder))]
    return sorted(found, key=lambda run: (run.created or "9", run.name))


def folder_bytes(path: Path) -> int:
    """Of a file, or of all files under a folder; links are not followed."""
    return sum(_sizes(path)) if path.is_dir() and not path.is_symlink() else next(_sizes_of([path]), 0)


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, files in os.walk(folder):
        yield from _sizes_of(Path(place, name) for name in files)


def _sizes_of(files: Any) -> Iterator[int]:
    for file in files:
        try:
            yield file.lstat().st_size
        except OSError:  # it went meanwhile
            continue


def summary(folder: Path) -> RunSummary:
    """A run in a line."""
    paths = RunPaths(folder)
    receipt, evaluation, damage = _read(paths)
    state, detail = _state(paths, receipt, evaluation, damage)
    values: JsonObject = {
        "path": str(folder),
        "name": folder.resolve().name,
        "state": state,
        "detail": detail,
        "bytes": folder_bytes(folder),
        "checkpoint_bytes": folder_bytes(paths.checkpoints) if paths.checkpoints.exists() else 0,
        "created": pick(receipt, "created"),
        "base": pick(receipt, "model", "name") or _base_of_task(paths),
        "kind": pick(receipt, "data", "kind"),
        "train_rows": pick(receipt, "data", "train_rows"),
        "held_out_rows": pick(evaluation, "rows"),
    }
    for side in ("base", "tuned"):
        values[f"{side}_loss"] = as_number(pick(evaluation, side, "loss"))
        accuracies = (as_number(pick(evaluation, side, key)) for key in ("accuracy", "preference_accuracy"))
        values[f"{side}_accuracy"] = next((value for value in accuracies if value is not None), None)
    try:
        return RunSummary.of(values)
    except ValueError as error:
        known = {key: values[key] for key in ("path", "name", "bytes", "checkpoint_bytes")}
        return RunSummary.of({**known, "state": "damaged", "detail": str(error)})


def _read(paths: RunPaths) -> tuple[JsonObject, JsonObject, str]:
    """(receipt, evaluation, what is wrong with them); {} for one that is not there."""
    found: list[JsonObject] = []
    damage = ""
    for path in (paths.receipt, paths.evaluation):
        try:
            value = read_json(path) if path.exists() else {}
        except (OSError, ValueError) as error:
            value, damage = {}, f"{path} cannot be read: {error}"
        found.append(value if is_object(value) else {})
    return found[0], found[1], damage


def _state(paths: RunPaths, receipt: JsonObject, evaluation: JsonObject, damage: str) -> tuple[RunState, str]:
    if damage:
        return "damaged", damage
    if is_locked(run_lock(paths.root)):
        return "in use", "a process works in it"
    if not receipt:
        steps = [int(entry.name.partition("-")[2]) for entry in paths.checkpoints.glob("step-*") if _numbered(entry)]
        where = f"stopped after step {max(steps)}" if steps else "no checkpoint yet"
        return "unfinished", f"{where}; the same `tunery train` resumes it"
    return ("finished", "") if evaluation else ("not evaluated", "`tunery eval` measures it")


def _numbered(entry: Path) -> bool:
    return entry.name.partition("-")[2].isdigit()


def _base_of_task(paths: RunPaths) -> str | None:
    try:
        return load_task(paths.task).model
    except TuneryError:
        return None


# --------------------------------------------------------------------------- comparison


def compare_runs(runs: Sequence[str | Path]) -> RunComparison:
    """What differs between runs: settings and results.

    Raises:
        ConfigError: a folder is not a run directory, or there are fewer than two.
        CheckpointError: a file of a run is damaged.
    """
    if len(runs) < 2:
        raise ConfigError("a comparison needs at least two runs", "tunery runs compare runs/A runs/B")
    folders = [_find(Path(run)) for run in runs]
    read = [_read(RunPaths(folder)) for folder in folders]
    if damage := [damage for *_, damage in read if damage]:
        raise CheckpointError(damage[0], "restore it, or leave that run out")
    tasks = [load_task(RunPaths(folder).task).model_dump(mode="json") for folder in folders]
    receipts, evaluations = [each[0] for each in read], [each[1] for each in read]
    return RunComparison(
        runs=[summary(folder) for folder in folders],
        settings=_differing(tasks),
        results=_results(evaluations),
        remarks=_remarks(receipts, evaluations),
    )


def _find(run: Path) -> Path:
    """A run by its folder, or by its name in runs/."""
    for folder in (run, RUNS / run):
        if folder.is_dir() and is_run(folder):
            return folder
    if run.is_dir():
        raise ConfigError(f"{run} is not a run directory", "give folders that `tunery train` named, e.g. runs/my-task")
    known = [entry.name for entry in run_folders(RUNS)] if RUNS.is_dir() else []
    listed = f"`tunery runs` lists those in {RUNS}"
    raise ConfigError(f"there is no run {run}", did_you_mean(run.name, known) or listed)


def _differing(tasks: Sequence[JsonMapping]) -> dict[str, list[Any]]:
    """Setting → its value in each task, of those that are not the same in all."""
    values = {name: [pick(task, *name.split(".")) for task in tasks] for name, _ in all_settings()}
    return {
        name: each
        for name, each in values.items()
        if name != "name" and len({json.dumps(value, sort_keys=True) for value in each}) > 1
    }


def _results(evaluations: Sequence[JsonMapping]) -> dict[str, ComparedMetric]:
    found: dict[str, ComparedMetric] = {}
    for metric in METRICS:
        sides = {
            side: [as_number(pick(evaluation, side, metric.key)) for evaluation in evaluations]
            for side in ("base", "tuned")
        }
        if any(value is not None for value in sides["tuned"]):
            found[metric.key] = ComparedMetric(base=sides["base"], tuned=sides["tuned"])
    return found


def _remarks(receipts: Sequence[JsonMapping], evaluations: Sequence[JsonMapping]) -> list[str]:
    found: list[str] = []
    if len({_held_out_hash(*pair) for pair in zip(receipts, evaluations, strict=True) if pair[1]}) > 1:
        found.append("The runs were measured on different held-out rows, so their results cannot be compared directly.")
    if len({pick(receipt, "data", "kind") for receipt in receipts if receipt}) > 1:
        found.append("The runs learned different kinds of rows.")
    if len({json.dumps(pick(receipt, "data", "rows_sha256", "train")) for receipt in receipts if receipt}) > 1:
        found.append("The runs were trained on different rows.")
    if len({pick(receipt, "model", "sha256") for receipt in receipts if receipt}) > 1:
        found.append("The runs have different bases: losses per token depend on the tokenizer.")
    return found


def _held_out_hash(receipt: JsonMapping, evaluation: JsonMapping) -> str:
    split = pick(evaluation, "split")
    hashed = pick(receipt, "data", "rows_sha256", split) if isinstance(split, str) else None
    return f"{hashed} {pick(evaluation, 'rows')}"
