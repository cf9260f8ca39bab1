"""A job on the server: may it be made, its files, the job itself, and what it says until it is done."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from tunery.errors import DataError, HostedError, TuneryError
from tunery.hosted import client as client_module
from tunery.hosted.client import NO_TRAINING, Service, code_of, is_local, said_by, training_closed
from tunery.hosted.hosted_plan import HostedPlan
from tunery.hosted.job_settings import to_yaml
from tunery.jsonl import JsonMapping, JsonObject, append_lines, read_lines
from tunery.openai_api.job_metrics import Curve
from tunery.paths import RunPaths, write_atomic
from tunery.progress import Note
from tunery.records.hosted_state import HostedState, UploadedFile
from tunery.text import similar_names
from tunery.training.metrics import RunLog, write_metrics

if TYPE_CHECKING:
    from openai import OpenAI

    from tunery.progress import Progress

NO_FILE = "file-tuneryasksifitmaytrain"
"""A file that does not exist: a job on it is refused, for this reason if nothing else stands in the way."""

FOLLOW_PATIENCE = 1800.0
"""Seconds without an answer after which following a job is given up; the job does not mind."""

FAILED = ("failed", "cancelled")
DONE = ("succeeded", *FAILED)
"""Statuses in which a job stays."""

SHORTEST_LOOK, LONGEST_LOOK = 1.0, 20.0
"""Seconds between two looks at a job: short after news, longer while there are none."""

SETTLING = 5.0
"""Seconds after which a job is there that a request made although it seemed to fail."""

_RECENT = 100
"""Jobs looked through for one that was made although its making seemed to fail."""


def require_access(service: Service, model: str) -> None:
    """Ask for a job on a file that does not exist: it says whether this key may train this model, and costs nothing.

    Raises:
        TuneryError: the key is refused, training is closed to the account, or the model cannot be trained there.
    """
    import openai

    doing = f"asking whether {model} can be trained"

    def probe(client: OpenAI) -> JsonObject | openai.APIStatusError:
        try:
            return as_dict(client.fine_tuning.jobs.create(model=model, training_file=NO_FILE))
        except (openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError) as error:
            return error

    answer = service.call(doing, probe)
    if not isinstance(answer, openai.APIStatusError):  # made all the same: it has no rows, and must not stay
        cancel(service, answer["id"])
        return
    said = said_by(answer, service.server)
    if code_of(answer) == NO_TRAINING or NO_TRAINING in said:
        raise training_closed(service.server, said)
    about_model = answer.param == "model" or code_of(answer) in ("model_not_found", "model_not_available")
    about_file = answer.param == "training_file" or NO_FILE in said
    if about_model and not about_file:
        raise HostedError(f"{service.address} does not train {model}: {said}", _models_there(service, model))


def _models_there(service: Service, model: str) -> str:
    """A hint with the models that the server has, the most similar first."""
    names = sorted(service.call("listing models", lambda client: [one.id for one in client.models.list()]))
    if not names:
        return "the server lists no models; check the address and the key"
    close = similar_names(model, names, 3, 0.5)
    rest = [name for name in names if name not in close and not name.startswith("ft:")]
    return f"models there: {', '.join([*close, *rest][:20])}"


def upload(service: Service, path: Path) -> UploadedFile:
    """Send a file of rows.

    Returns:
        Its id and size there.

    Raises:
        TuneryError: refused, or failed again and again; HostedError: what arrived has another size.
    """
    doing = f"uploading {path.name}"

    def send(client: OpenAI) -> JsonObject:
        patient = client.with_options(timeout=client_module.LONG_TIMEOUT)
        with open(path, "rb") as file:  # anew for each try: a dropped connection leaves it half read
            return as_dict(patient.files.create(file=file, purpose="fine-tune"))

    found = service.call(doing, send)
    size = path.stat().st_size
    arrived = found["bytes"] if isinstance(found.get("bytes"), int) else None
    if arrived and arrived != size:
        raise HostedError(f"{doing}: {size:,} bytes were sent and {arrived:,} arrived", "run the same command again")
    return UploadedFile(id=found["id"], bytes=arrived)


def content(service: Service, file: str) -> bytes:
    """The content of a file there."""
    return service.call(f"fetching {file}", lambda client: client.files.content(file).content)


def create(service: Service, request: JsonMapping) -> JsonObject:
    """Make the job, once.

    A request whose answer was lost may have made it: a job on the same training file, which only this run uses, is
    taken for it. Where one came so late that there are two, the later ones are cancelled.
    """
    tries = 0

    def make(client: OpenAI) -> JsonObject:
        nonlocal tries
        if tries:
            client_module.sleep(SETTLING)
        tries += 1
        patient = client.with_options(timeout=client_module.LONG_TIMEOUT)
        made = _made_on(client, request["training_file"])
        return made[0] if made else as_job(patient.fine_tuning.jobs.create(**request))

    made = service.call("creating the job", make)
    return find(service, request["training_file"]) or made


def find(service: Service, training_file: str) -> JsonObject | None:
    """The one job on a training file, which only one run uses; later ones that still go on are cancelled."""
    made = service.call("looking for the job", lambda client: _made_on(client, training_file))
    for job in made[1:]:
        if job["status"] not in DONE:
            service.note(Note(f"{job['id']} is cancelled: it is the same job as {made[0]['id']}"))
            cancel(service, job["id"])
    return made[0] if made else None


def _made_on(client: OpenAI, training_file: str) -> list[JsonObject]:
    """The jobs on a training file; those that still go on or have succeeded first, and of these the oldest."""
    import openai

    try:
        recent = client.fine_tuning.jobs.list(limit=_RECENT).data
    except (openai.NotFoundError, openai.BadRequestError):  # a server that lists none
        return []
    made = [as_job(job) for job in reversed(recent or ()) if job.training_file == training_file]
    return sorted(made, key=lambda job: job["status"] in FAILED)


def as_dict(answer: BaseModel) -> JsonObject:
    """An object of the client as JSON values.

    Raises:
        TypeError, AttributeError: it is not one.
    """
    values = answer.model_dump(mode="json", exclude_none=False, warnings=False)
    if not isinstance(values.get("id"), str):
        raise TypeError("an object without an id")
    return values


def as_job(answer: BaseModel) -> JsonObject:
    """A job of the client as JSON values.

    Raises:
        TypeError, AttributeError: it is not one.
    """
    values = as_dict(answer)
    if not all(isinstance(values.get(name), str) for name in ("status", "model", "training_file")):
        raise TypeError("a job without a status, model or training file")
    return values


def retrieve(service: Service, job: str) -> JsonObject:
    """The job as it is now."""
    return service.call(
        f"looking at {job}", lambda client: as_job(client.fine_tuning.jobs.retrieve(job)), patience=FOLLOW_PATIENCE
    )


def cancel(service: Service, job: str) -> JsonObject:
    """Cancel the job; it is then described as it is."""
    return service.call(f"cancelling {job}", lambda client: as_job(client.fine_tuning.jobs.cancel(job)))


# --------------------------------------------------------------------------- events


class EventLog:
    """The events of a job, each once, in the order in which they happened; kept in a file, a line each."""

    def __init__(self, path: Path):
        self._path = path
        self.events = [event for event in read_lines(path) if "id" in event]
        self._seen = {event["id"] for event in self.events}

    def fetch(self, service: Service, job: str) -> list[JsonObject]:
        """Those that are new, written down."""

        def newer(client: OpenAI) -> list[JsonObject]:
            found: list[JsonObject] = []
            for event in client.fine_tuning.jobs.list_events(job, limit=100):  # newest first, page by page
                if event.id in self._seen:
                    break
                found.append(as_dict(event))
            return found[::-1]

        new = service.call(f"following {job}", newer, patience=FOLLOW_PATIENCE)
        new = list({event["id"]: event for event in new}.values())  # pages shift when events arrive between them
        append_lines(self._path, new)
        self.events += new
        self._seen |= {event["id"] for event in new}
        return new


# --------------------------------------------------------------------------- following


@dataclass
class Poller:
    """Looks at a job until it is done.

    Attributes:
        told: given each new event.
        changed: given the job whenever its status is another one.
    """

    service: Service
    log: EventLog
    told: Callable[[JsonObject], None]
    changed: Callable[[JsonObject], None]

    def poll(self, job_id: str) -> JsonObject:
        """Until the job is done; the job then."""
        pause, status = SHORTEST_LOOK, ""
        longest = 3 * SHORTEST_LOOK if is_local(self.service.address) else LONGEST_LOOK
        while True:
            job = retrieve(self.service, job_id)
            new = self.log.fetch(self.service, job_id)
            for event in new:
                self.told(event)
            if job["status"] != status:
                status = job["status"]
                self.changed(job)
            if status in DONE:
                return job
            pause = SHORTEST_LOOK if new else min(1.5 * pause, longest)
            client_module.sleep(pause)


_STEP = re.compile(r"^Step \d+(/\d+)?:")
"""What a metrics event says besides its data."""

PAUSED = "the job is paused; it continues when someone resumes it there"


def follow(service: Service, plan: HostedPlan, state: HostedState, paths: RunPaths, progress: Progress) -> JsonObject:
    """Until the job is done: the job then. metrics.jsonl holds all that is known of its steps."""
    log = EventLog(paths.events)
    curve = Curve(epochs=int(plan.task.train.epochs))
    for event in log.events:  # of an earlier call: told already
        curve.take(_data(event))
    write_metrics(paths.metrics, curve.lines())
    settings, step = {"task": to_yaml(plan.task)}, max(curve.points, default=0)
    with RunLog.open(plan.task, settings, paths, progress, step, keep_until_step=None) as run_log:
        telling = _Telling(curve, run_log)
        telling.show(step)

        def changed(job: JsonObject) -> None:
            state.job = job
            state.save(paths)
            if job["status"] == "paused":  # the one status of which no event tells
                progress.note(Note(PAUSED))

        job = Poller(service, log, telling.event, changed).poll(state.job_id or "")
    for result in job.get("result_files") or ():
        _take_results(service, str(result), curve, paths, progress)
    write_metrics(paths.metrics, curve.lines())
    return job


def _data(event: JsonMapping) -> JsonMapping:
    data = event.get("data")
    return data if isinstance(data, Mapping) else {}


@dataclass
class _Telling:
    """Passes on what a job says: its metrics as lines of the log, its messages as notes."""

    curve: Curve
    log: RunLog
    shown: bool = False

    def event(self, event: JsonMapping) -> None:
        """A new event."""
        data, message = _data(event), str(event.get("message", ""))
        lines = self.curve.take(data)
        self.show(max(self.curve.points, default=0))
        for line in lines:
            self.log.log(line)
        if not lines and not _STEP.match(message):
            level = event.get("level")
            text = message if level in (None, "info") else f"{level}: {message}"
            self.log.note(Note(text, level=level if level in ("warn", "error") else "info", code="server"))

    def show(self, done: int) -> None:
        """Show the bar, once it is known how long it is."""
        if not self.shown and self.curve.total_steps:
            self.log.start(self.curve.total_steps, done)
            self.shown = True


def _take_results(service: Service, file: str, curve: Curve, paths: RunPaths, progress: Progress) -> None:
    """A result file's steps; without it the events say enough."""
    try:
        found = content(service, file)
    except HostedError as error:
        progress.note(Note(f"the result file {file} could not be fetched: {error.message}"))
        return
    write_atomic(paths.results, found)
    curve.take_csv(found)


# --------------------------------------------------------------------------- the end


def failure(job: JsonMapping, plan: HostedPlan) -> TuneryError:
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
            said, f"{named}Fix the rows and run the same command again; they were sent as in the run's folder sent/"
        )
    return HostedError(said, "run the same command again for a new job")


def _numbers(said: str) -> list[int]:
    """The examples that a message names, counted from 1: "Example 100, message 2" → 100."""
    return [int(number) for number in re.findall(r"(?i)\b(?:example|line|row)s? #?(\d+)", said) if int(number) > 0]
