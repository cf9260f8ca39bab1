"""The look at a job's files before it is queued, done in a short process of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunery.config import DataConfig, Kind
from tunery.data.detect import check_columns, detect
from tunery.data.example import Problem
from tunery.data.formats import open_source
from tunery.data.source import Row, printable, shown_path
from tunery.data.validate import check_row
from tunery.errors import ConfigError, DataError
from tunery.paths import write_atomic, write_json
from tunery.serve.jobs.folder import JobFolder
from tunery.serve.jobs.translate import FEWEST_EXAMPLES, JobSpec, make_task, settle

PROBLEMS_SHOWN = 20

_FORMS = {
    "supervised": 'each line of a file holds {"messages": […]}, or each {"prompt": …, "completion": …}',
    "dpo": 'each line of a file holds {"input": {"messages": […]}, "preferred_output": […], '
    '"non_preferred_output": […]}',
}


@dataclass(frozen=True)
class Facts:
    """What the look at a job's files has found.

    Attributes:
        kind: of the rows.
        examples, validation_examples: rows of each file.
        hyperparameters: settled, under OpenAI's names.
        steps: optimizer steps of the run.
        seconds: a first estimate of their time.
        warnings: what the user should know, a sentence each.
    """

    kind: Kind
    examples: int
    validation_examples: int
    hyperparameters: dict[str, Any]
    steps: int
    seconds: float
    warnings: list[str]


class BadFileError(DataError):
    """A file of a job that cannot be used.

    Args:
        param: the request's field that names it.
    """

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


def validate(folder: JobFolder) -> Facts:
    """Read a job's files, settle its hyperparameters, and write its task and these facts into its folder.

    Raises:
        BadFileError: a file that cannot be used; the message names the examples and what is wrong with them.
        TuneryError: the job cannot run for another reason: a missing tracker, settings that do not go together.
    """
    from tunery.api import check
    from tunery.training.metrics import require_tracker

    spec = JobSpec.read(folder)
    for tracker in spec.trackers:
        require_tracker(tracker)
    kind = _kind(spec, folder.data("training_file"))
    counts = {param: _count(folder.data(param), param, kind, spec) for param in spec.params}
    examples = counts["training_file"]
    settled = settle(spec.asked, spec.method, examples)
    task = make_task(spec, folder, kind, settled, _precision(spec))
    try:
        report = check(task, samples=0)
    except DataError as error:
        message = f"{error.message}. {error.hint}" if error.hint and "--" not in error.hint else error.message
        raise _bad(_blamed(message, spec, folder), _plain(message, folder)) from error
    facts = Facts(
        kind=kind,
        examples=examples,
        validation_examples=counts.get("validation_file", 0),
        hyperparameters=settled,
        steps=report["training"]["steps"],
        seconds=report["training"]["seconds"],
        warnings=[_plain(text, folder) for text in _warnings(report)],
    )
    write_atomic(folder.task, task.to_yaml())
    write_json(folder.facts, asdict(facts))
    return facts


def _precision(spec: JobSpec) -> str:
    """The number format of the base: as set for all jobs, else the faster one, tried once for the whole job."""
    from tunery.models.device import pick_device, resolve_dtype

    train = spec.defaults.get("train") or {}
    dtype, _ = resolve_dtype(train.get("precision") or "auto", pick_device(train.get("device") or "auto"))
    return str(dtype).removeprefix("torch.")


def _warnings(report: dict[str, Any]) -> list[str]:
    data, training = report["data"], report["training"]
    found = list(report["remarks"])
    if data["dropped"]:
        found.append(f"{data['dropped']:,} examples are left out: {data['dropped_rows'][0]['reason']}")
    if data["truncated"]:
        found.append(f"{data['truncated']:,} examples are longer than {data['max_length']:,} tokens and are cut")
    if training["memory_bytes"] > training["available_bytes"]:
        needed, free = training["memory_bytes"] / 1e9, training["available_bytes"] / 1e9
        found.append(f"training may need {needed:.1f} GB of memory; {free:.1f} GB are free now")
    return found


# --------------------------------------------------------------------------- examples


def _kind(spec: JobSpec, path: Path) -> Kind:
    """What the rows are. A supervised file holds completions if its first sound row does, else conversations."""
    if len(spec.kinds) == 1:
        return spec.kinds[0]
    try:
        first = next((item.value for item in open_source(str(path)).items if isinstance(item, Row)), {})
    except DataError:
        first = {}
    return "completion" if "messages" not in first and {"prompt", "completion"} <= set(first) else "chat"


def _count(path: Path, param: str, kind: Kind, spec: JobSpec) -> int:
    """How many examples a file holds.

    Raises:
        BadFileError: one of them has a problem, or there are too few.
    """
    try:
        problems, bad, rows = _read(path, kind)
    except ConfigError as error:  # not a single row has what its kind needs
        raise _bad(param, f"{_plain(error.message, JobFolder(path.parent))}; {_FORMS[spec.method]}") from error
    except DataError as error:
        raise _bad(param, _plain(f"{error.message}. {error.hint}", JobFolder(path.parent))) from error
    if problems:
        raise _bad(param, _listed(problems, bad, rows))
    if param == "training_file" and rows < FEWEST_EXAMPLES:
        raise _bad(param, f"it has {rows} example{'s' * (rows != 1)}, and at least {FEWEST_EXAMPLES} are needed")
    if not rows:
        raise _bad(param, "it holds no examples")
    return rows


def _read(path: Path, kind: Kind) -> tuple[list[Problem], int, int]:
    """(all problems of a file's rows, how many rows have one, how many rows there are)."""
    source = open_source(str(path))
    items = list(source.items)
    values = [item.value for item in items if isinstance(item, Row)]
    problems: list[Problem] = [problem for item in items if not isinstance(item, Row) for problem in item]
    bad = len(items) - len(values)
    if not values:
        return problems, bad, len(items)
    shape = detect(values, DataConfig(train=str(path), kind=kind))
    check_columns(shape, values, source.shown)
    for item in items:
        found = check_row(source.shown, item, shape) if isinstance(item, Row) else None
        if isinstance(found, list):
            bad += 1
            problems += found
    return sorted(problems, key=lambda problem: problem.line), bad, len(items)


def _listed(problems: Sequence[Problem], bad: int, rows: int) -> str:
    count = len(problems)
    lines = [f"{count:,} problem{'s' * (count > 1)} in {bad:,} of {rows:,} examples:"]
    lines += [printable(sentence(problem), 500) for problem in problems[:PROBLEMS_SHOWN]]
    if count > PROBLEMS_SHOWN:
        lines.append(f"… and {count - PROBLEMS_SHOWN:,} more")
    return "\n".join(lines)


def sentence(problem: Problem) -> str:
    """A problem as a job's error names it: "Example 100, message 2 (messages[1].role): missing → …".

    Examples are counted by the lines of the file, from 1, and so are the messages in them.
    """
    where = f"Example {problem.line}"
    if found := re.search(r"\bmessages\[(\d+)\]", problem.field):
        where += f", message {int(found[1]) + 1}"
    named = "" if problem.field.startswith("(") else f" ({problem.field})"
    return f"{where}{named}: {problem.message} → {problem.fix}"


def _bad(param: str, what: str) -> BadFileError:
    noun = param.replace("_", " ")
    return BadFileError(param, f"The job failed due to an invalid {noun}. {what[0].upper()}{what[1:]}")


def _plain(text: str, folder: JobFolder) -> str:
    """A message with the request's names of files instead of where they lie on the server."""
    for param in ("training_file", "validation_file"):
        path = folder.data(param)
        for name in dict.fromkeys((str(path), shown_path(path), path.name)):
            text = text.replace(name, param)
    return text


def _blamed(message: str, spec: JobSpec, folder: JobFolder) -> str:
    """The file that a message is about."""
    return next(
        (param for param in reversed(spec.params) if shown_path(folder.data(param)) in message), "training_file"
    )
