"""`tunery init --from FILE`: the task file for rows that are there, with what was found in them filled in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from tunery.config import BUILT_IN_MODELS, Columns, DataConfig
from tunery.data.examine import Examined, examine_files
from tunery.data.kinds import KINDS
from tunery.data.prompts import Prompts
from tunery.errors import ConfigError, DataError
from tunery.scaffold import write_new
from tunery.task_file import name_after
from tunery.text import plural

_HUB = "hub:"

_HELD_OUT = ((8, None), (200, 0.3), (2_000, 0.2), (10_000, 0.1))
"""Below so many rows → `data.validation`; a few hundred held-out rows tell five points of accuracy from chance."""

_MOST_HELD_OUT = 1000
"""Rows held out of many."""


def draft(source: str, folder: str | Path | None = None, model: str | None = None) -> tuple[list[Path], list[str]]:
    """Write a commented task.yaml for a file of rows.

    Args:
        source: as in `data.train`.
        folder: where to write; left out, a folder named like the file, in the current one.
        model: the base; left out, the smallest built-in one.

    Returns:
        (files written, what was decided and what is wrong with rows, a sentence each).

    Raises:
        ConfigError: the file is not there, it cannot be told what its columns hold, or a task file is there already.
        DataError: it holds no row that can be used.
    """
    if not source.strip():
        raise ConfigError("--from names no file", "give the file with your rows")
    found = examine_files([source], DataConfig(train=source))
    _require_rows(source, found)
    target = Path(folder) if folder is not None else Path(name_after(source) or "my-task")
    text = _task(_seen_from(target, source), found, model or next(iter(BUILT_IN_MODELS)), target)
    notes = list(found.notes)
    if found.problems:
        bad = len({(problem.file, problem.line) for problem in found.problems})
        notes.append(f"{plural(bad, 'row')} cannot be used as they are; `tunery check` lists what is wrong with each.")
    return write_new(target, {"task.yaml": text}), notes


def _require_rows(source: str, found: Examined) -> None:
    first = found.problems[0] if found.problems else None
    if found.kind is None:
        told = (first.message, first.fix) if first else (f"{source} holds no rows", "add some, or name another file")
        raise ConfigError(*told)
    if not found.examples:
        raise DataError(str(first) if first else f"{source} holds no rows", "fix the rows, or name another file")


def _seen_from(folder: Path, source: str) -> str:
    """How the task file names its rows: relative to itself."""
    if source.startswith(_HUB):
        return source
    path = Path(source).expanduser().absolute()
    try:
        return Path(os.path.relpath(path, folder.absolute())).as_posix()
    except ValueError:  # another drive, on Windows
        return path.as_posix()


# --------------------------------------------------------------------------- the file


def _task(train: str, found: Examined, model: str, folder: Path) -> str:
    rows = len(found.examples)
    sections = (_head(folder), _model(model), _data(train, found, rows), _training(rows))
    return "\n".join("".join(f"{line}\n" for line in lines) for lines in sections)


def _head(folder: Path) -> list[str]:
    task = folder / "task.yaml"
    return [
        "# Written for your own rows by `tunery init --from`. Change what does not suit, then:",
        "#",
        f"#   tunery check {task}     look at the data; nothing is trained",
        f"#   tunery train {task}     train, compare with the base model, write a report",
        "#",
        "# Paths are relative to this file. `tunery settings` lists all settings; those not named here have a default.",
    ]


def _model(model: str) -> list[str]:
    return [f"model: {_scalar(model)}    # or another hub id (Qwen/Qwen3-0.6B), a folder, a .gguf file"]


def _data(train: str, found: Examined, rows: int) -> list[str]:
    kind = KINDS[found.kind or "text"]
    columns = {role: column for role, column in found.columns.items() if role in Columns.model_fields}
    lines = ["data:", f"  train: {_scalar(train)}    # {plural(rows, kind.noun)}", _validation(rows, kind.noun)]
    lines.append(f"  kind: {kind.name}")
    if columns:
        lines.append(f"  columns: {_flow(columns)}    # what is read, and from which column")
    if found.labels:
        lines += _labels(found)
    return lines


def _validation(rows: int, noun: str) -> str:
    share = next((share for below, share in _HELD_OUT if rows < below), _MOST_HELD_OUT)
    if share is None:
        return f"  validation: null    # so few {noun}s are all needed to train; nothing is measured then"
    about = plural(round(rows * share) if share < 1 else int(share), noun)
    return f"  validation: {share}    # held out and never trained: {about}; or a number, or a file of its own"


def _labels(found: Examined) -> list[str]:
    lines = ["  # The value in the file: the word the model answers. Short, plain words work best."]
    lines.append("  labels:")
    for label in found.labels:
        count = sum(example.label == label for example in found.examples)
        lines.append(f"    {_scalar(label)}: {_scalar(label)}    # {plural(count, 'row')}")
    return [*lines, f"  instruction: {_scalar(Prompts(labels=found.labels).instruction)}"]


def _training(rows: int) -> list[str]:
    epochs, batch = (1, 16) if rows >= 1000 else (3, 8 if rows >= 100 else 4)
    return [
        "train:",
        f"  epochs: {epochs}    # passes over the rows",
        f"  batch_size: {batch}    # rows per step; memory does not depend on it",
        "  # learning_rate: 2e-4        # left out: a rule from the model's width; `tunery check --lr-test` tries some",
        "  # early_stopping_patience: 2 # stop when the validation loss no longer falls, and go back to the best step",
        "",
        "# lora:",
        "#   rank: 16                    # width of the update: more can learn more, and costs more",
    ]


def _scalar(text: str) -> str:
    """A text as YAML writes it, in quotes where it would be taken for something else."""
    return _flow([text])[1:-1]


def _flow(value: dict[str, str] | Sequence[str]) -> str:
    """On one line."""
    plain = dict(value) if isinstance(value, dict) else list(value)
    return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1e9).strip()
