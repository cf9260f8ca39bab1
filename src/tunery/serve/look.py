"""A look at a file before any job: problems by line, what would be trained, and how long it might take.

It builds the task of such a job in a folder of its own, as a job's worker does, and asks the functions behind `tunery
check` about it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from tunery.config import KindName, Task
from tunery.data.example import Problem
from tunery.jsonl import JsonMapping, JsonObject
from tunery.serve.files import Files
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.jobs.translate import FEWEST_EXAMPLES, JobSpec, Use, make_task, settle
from tunery.serve.jobs.validate import kind_of

MOST_PROBLEMS = 200
FEWEST: Mapping[Use, int] = {"training": FEWEST_EXAMPLES, "validation": 1}
"""Rows that a file needs."""

SAMPLES = 4
"""Rows shown with their trained tokens; a pair of answers is two."""


def look(
    files: Files,
    file_id: str,
    base: str,
    start: Path | None,
    method: str,
    asked: Mapping[str, float],
    defaults: JsonMapping,
    home: Path,
    use: Use = "training",
) -> JsonObject:
    """What a job on this file would meet.

    Args:
        files, file_id: the file, among the server's.
        base, start: of the model asked for: what Task.model names, and the adapter to start from.
        asked: hyperparameters that are not left to "auto".
        defaults: settings for all jobs.
        home: the server's folder; a folder in it is made and removed.
        use: what the job would use the file for.

    Returns:
        {problems: [{line, field, message, fix}] (at most 200), problems_total, rows, kind, and, if a row is good,
        tokens, trained_tokens, previews: [{line, title?, pieces: [{text, trained}]}], steps, hyperparameters,
        seconds_estimate, notes}.

    Raises:
        ApiError: 404, there is no such file.
        TuneryError: the settings for all jobs do not go together with this job.
    """
    with tempfile.TemporaryDirectory(prefix=".look-", dir=home) as temporary:
        folder = JobFolder(Path(temporary))
        files.link(file_id, folder.data("training_file"))
        spec = JobSpec(base, method, 0, asked=dict(asked), goes_on=start is not None, defaults=dict(defaults))
        if start is not None:
            folder.start.symlink_to(start, target_is_directory=True)
        kind = kind_of(spec, folder.data("training_file"))
        return _look(spec, folder, kind, FEWEST[use])


def _look(spec: JobSpec, folder: JobFolder, kind: KindName, fewest: int) -> JsonObject:
    from tunery import api

    found = api.examine(make_task(spec, folder, kind, settle(spec.asked, spec.method, FEWEST_EXAMPLES), "auto"))
    examined = found["train"]
    problems = [_problem(problem) for problem in examined.problems]
    if not problems and examined.rows < fewest:
        message = f"{examined.rows} examples; a job needs at least {fewest}"
        problems.append({"line": 0, "field": "(file)", "message": message, "fix": "add examples"})
    result = {
        "problems": problems[:MOST_PROBLEMS],
        "problems_total": len(problems),
        "rows": examined.rows,
        "kind": examined.kind or kind,
    }
    if examined.examples:
        settled = settle(spec.asked, spec.method, len(examined.examples))
        result |= _would_train(make_task(spec, folder, kind, settled, "auto"), settled)
    return result


def _problem(problem: Problem) -> JsonObject:
    return {"line": problem.line, "field": problem.field, "message": problem.message, "fix": problem.fix}


def _would_train(task: Task, settled: Mapping[str, float]) -> JsonObject:
    """Tokens, rows with their trained stretches, steps and time, of the good rows alone."""
    from tunery import api

    lenient = task.model_copy(update={"data": task.data.model_copy(update={"on_bad_row": "skip"})})
    report = api.check_local(lenient, samples=SAMPLES)
    previews = [
        {
            "line": line,
            **({"title": _TITLES[side]} if side else {}),
            "pieces": [{"text": text, "trained": trained} for text, trained in pieces],
        }
        for pieces, side, line in zip(report.samples, report.sample_sides, report.sample_lines, strict=True)
    ]
    return {
        "tokens": report.tokens.all,
        "trained_tokens": report.tokens.trained,
        "previews": previews,
        "steps": report.training.steps,
        "hyperparameters": dict(settled),
        "seconds_estimate": report.training.seconds,
        "notes": [*report.remarks],
    }


_TITLES = {"chosen": "preferred", "rejected": "not preferred"}
"""Which answer of a pair → what the page calls it."""
