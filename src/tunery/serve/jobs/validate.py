"""The look at a job's files before it is queued, done in a short process of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tunery.config import KindName
from tunery.data.examine import Examined
from tunery.data.example import Problem
from tunery.data.formats import open_source
from tunery.data.problem_list import by_cause
from tunery.data.source import RawRow, printable, shown_path
from tunery.errors import DataError
from tunery.openai_api.methods import METHODS
from tunery.paths import write_atomic, write_json
from tunery.records.check_report import CheckReport
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.jobs.translate import FEWEST_EXAMPLES, JobSpec, make_task, settle
from tunery.text import gigabytes, plural

_PARAMS = {"train": "training_file", "validation": "validation_file"}


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

    kind: KindName
    examples: int
    validation_examples: int
    hyperparameters: dict[str, float]
    steps: int
    seconds: float
    warnings: list[str]


class BadFileError(DataError):
    """A file of a job that cannot be used.

    Args:
        param: the request's field that names it.
    """

    def __init__(self, param: str, message: str):
        super().__init__(message, param=param)


def validate(folder: JobFolder) -> Facts:
    """Read a job's files, settle its hyperparameters, and write its task and these facts into its folder.

    Raises:
        BadFileError: a file that cannot be used; the message names the examples and what is wrong with them.
        TuneryError: the job cannot run for another reason: a missing tracker, settings that do not go together.
    """
    from tunery import api
    from tunery.training.metrics import require_tracker

    spec = JobSpec.read(folder)
    for tracker in spec.trackers:
        require_tracker(tracker)
    kind, precision = kind_of(spec, folder.data("training_file")), _precision(spec)
    task = make_task(spec, folder, kind, settle(spec.asked, spec.method, FEWEST_EXAMPLES), precision)
    counts = _counts(api.examine(task), spec, folder)
    settled = settle(spec.asked, spec.method, counts["train"])
    task = make_task(spec, folder, kind, settled, precision)
    try:
        report = api.check_local(task, samples=0)
    except DataError as error:
        raise _bad(_blamed(error.message, spec, folder), _plain(error.message, folder)) from error
    facts = Facts(
        kind=kind,
        examples=counts["train"],
        validation_examples=counts.get("validation", 0),
        hyperparameters=settled,
        steps=report.training.steps,
        seconds=report.training.seconds,
        warnings=[_plain(text, folder) for text in _warnings(report)],
    )
    write_atomic(folder.task, task.to_yaml())
    write_json(folder.facts, asdict(facts))
    return facts


def _precision(spec: JobSpec) -> str:
    """The dtype of the base: as set for all jobs, else the faster one, tried once for the whole job."""
    from tunery.models.device import pick_device, resolve_dtype

    train = spec.defaults.get("train") or {}
    dtype, _ = resolve_dtype(train.get("precision") or "auto", pick_device(train.get("device") or "auto"))
    return str(dtype).removeprefix("torch.")


def _warnings(report: CheckReport) -> list[str]:
    data, training = report.data, report.training
    found = list(report.remarks)
    if data.dropped:
        found.append(f"{data.dropped:,} examples are left out: {data.dropped_rows[0].reason}")
    if data.truncated:
        found.append(f"{data.truncated:,} examples are longer than {data.limit:,} tokens and are cut")
    if training.memory_bytes > training.available_bytes:
        needed, free = gigabytes(training.memory_bytes), gigabytes(training.available_bytes)
        found.append(f"training may need {needed} of memory; {free} are free now")
    return found


# --------------------------------------------------------------------------- examples


def kind_of(spec: JobSpec, path: Path) -> KindName:
    """What the rows are. A supervised file holds completions if its first sound row does, else conversations."""
    if len(spec.kinds) == 1:
        return spec.kinds[0]
    try:
        first = next((item.value for item in open_source(str(path)).items if isinstance(item, RawRow)), {})
    except DataError:
        first = {}
    texts = isinstance(first, dict) and all(isinstance(first.get(key), str) for key in ("prompt", "completion"))
    return "completion" if "messages" not in first and texts else "chat"


def _counts(found: Mapping[str, Examined], spec: JobSpec, folder: JobFolder) -> dict[str, int]:
    """How many examples each file holds.

    Raises:
        BadFileError: one of them has a problem, or there are too few.
    """
    for split, examined in found.items():
        if examined.problems:
            listed = _listed(examined.problems, examined.rows, METHODS[spec.method].form)
            raise _bad(_PARAMS[split], _plain(listed, folder))
    rows = found["train"].rows
    if rows < FEWEST_EXAMPLES:
        raise _bad("training_file", f"it has {rows} examples, and at least {FEWEST_EXAMPLES} are needed")
    return {split: examined.rows for split, examined in found.items()}


def _listed(problems: Sequence[Problem], rows: int, form: str) -> str:
    """What is wrong with a file of so many rows, cause by cause."""
    if problems[0].line == 0:  # the file as a whole
        return f"{printable(problems[0].message, 500)}. What is needed: {form}"
    bad = len({problem.line for problem in problems})
    lines = [f"{plural(len(problems), 'problem')} in {bad:,} of {rows:,} examples:"]
    return "\n".join([*lines, *by_cause(problems, sentence)])


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
