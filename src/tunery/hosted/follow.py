"""Following a job: its messages and metrics go where those of a training here go, and its end is put into words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import DataError, HostedError, TuneryError
from tunery.hosted.client import Service
from tunery.hosted.curve import Curve, Line
from tunery.hosted.hosted_plan import HostedPlan
from tunery.hosted.job import EventLog, Follower, content
from tunery.hosted.job_settings import to_yaml
from tunery.hosted.state import HostedState, events_path, results_path
from tunery.paths import RunPaths, write_atomic
from tunery.progress import Note
from tunery.training.metrics import MetricsWriter, Sink, open_sinks

if TYPE_CHECKING:
    from tunery.progress import Progress

_STEP = re.compile(r"^Step \d+(/\d+)?:")
"""What a metrics event says besides its data."""

PAUSED = "the job is paused; it goes on when someone resumes it there"


def follow(
    service: Service, plan: HostedPlan, state: HostedState, paths: RunPaths, progress: Progress
) -> dict[str, Any]:
    """Until the job is done: the job then. metrics.jsonl holds all that is known of its steps."""
    log = EventLog(events_path(paths))
    curve = Curve(epochs=int(plan.task.train.epochs))
    for event in log.events:  # of an earlier call: told already
        curve.take(_data(event))
    with _Telling.open(plan, curve, paths, progress) as telling:

        def changed(job: dict[str, Any]) -> None:
            state.job = job
            state.save(paths)
            if job["status"] == "paused":  # the one status of which no event tells
                progress.note(Note(PAUSED))

        job = Follower(service, log, telling.event, changed).follow(state.job_id or "")
    for result in job.get("result_files") or ():
        _take_results(service, str(result), curve, paths, progress)
    write_lines(paths.metrics, curve.lines())
    return job


def _data(event: Mapping[str, Any]) -> Mapping[str, Any]:
    data = event.get("data")
    return data if isinstance(data, Mapping) else {}


@dataclass
class _Telling:
    """Passes on what a job says: metrics to the file, the trackers and the progress; messages to the progress."""

    curve: Curve
    writer: MetricsWriter
    sinks: Sequence[Sink]
    progress: Progress
    shown: bool = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, plan: HostedPlan, curve: Curve, paths: RunPaths, progress: Progress) -> Iterator[_Telling]:
        """For as long as the job is followed."""
        known = curve.lines()
        step = max(curve.points, default=0)
        settings = {"task": to_yaml(plan.task)}
        sinks = open_sinks(plan.task.train.report_to, plan.task.name, settings, paths.root, first_step=step + 1)
        try:
            write_lines(paths.metrics, known)
            with MetricsWriter(paths.metrics, keep_until_step=None) as writer:
                telling = cls(curve, writer, sinks, progress)
                telling._show(step)
                yield telling
        finally:
            progress.close()
            for sink in sinks:
                sink.close()

    def event(self, event: dict[str, Any]) -> None:
        """A new event."""
        data, message = _data(event), str(event.get("message", ""))
        lines = self.curve.take(data)
        self._show(max(self.curve.points, default=0))
        for line in lines:
            self._line(line)
        if not lines and not _STEP.match(message):
            level = event.get("level")
            text = message if level in (None, "info") else f"{level}: {message}"
            self.progress.note(Note(text, level=level if level in ("warn", "error") else "info", code="server"))

    def _show(self, done: int) -> None:
        if not self.shown and self.curve.total_steps:
            self.progress.start(self.curve.total_steps, done)
            self.shown = True

    def _line(self, line: Line) -> None:
        self.writer.write(line)
        for sink in self.sinks:
            sink.log(line["step"], line)
        self.progress.log(line)


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    """metrics.jsonl with just these lines."""
    with MetricsWriter(path, keep_until_step=0) as writer:
        for line in lines:
            writer.write(line)


def _take_results(service: Service, file: str, curve: Curve, paths: RunPaths, progress: Progress) -> None:
    """A result file's steps; without it the events say enough."""
    try:
        found = content(service, file)
    except HostedError as error:
        progress.note(Note(f"the result file {file} could not be fetched: {error.message}"))
        return
    write_atomic(results_path(paths), found)
    curve.take_csv(found)


# --------------------------------------------------------------------------- the end


def failure(job: Mapping[str, Any], plan: HostedPlan) -> TuneryError:
    """Why a job came to nothing, in words, with the rows of ours that the server names."""
    if job["status"] == "cancelled":
        return HostedError(f"{job['id']} was cancelled", "run the same command again for a new job")
    error = job.get("error") or {}
    code, param = str(error.get("code") or ""), str(error.get("param") or "")
    said = f"{job['id']} failed: {error.get('message') or 'the server gives no reason'}" + (
        f" ({code})" if code else ""
    )
    if param in ("training_file", "validation_file") or "_file" in code:
        examples = plan.data.validation if param == "validation_file" or "validation" in code else plan.data.train
        rows = [where.where for number in _numbers(said) for where in examples[number - 1 : number]]
        named = f"that is {', '.join(rows[:5])}. " if rows else ""
        return DataError(
            said, f"{named}Mend the rows and run the same command again; they were sent as in the run's folder sent/"
        )
    return HostedError(said, "run the same command again for a new job")


def _numbers(said: str) -> list[int]:
    """The examples that a message names, counted from 1: "Example 100, message 2" → 100."""
    return [int(number) for number in re.findall(r"(?i)\b(?:example|line|row)s? #?(\d+)", said) if int(number) > 0]
