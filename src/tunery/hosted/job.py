"""A job's life on the server: may it be made, its files, the job itself, and what it says until it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import HostedError
from tunery.hosted import client as client_module
from tunery.hosted.client import Service, is_local
from tunery.hosted.failures import NO_TRAINING, code_of, said_by, training_closed
from tunery.hosted.state import DONE
from tunery.jsonl import append_lines, read_lines
from tunery.progress import Note
from tunery.text import similar_names

if TYPE_CHECKING:
    from openai import OpenAI

NO_FILE = "file-tuneryasksifitmaytrain"
"""A file that does not exist: a job on it is refused, for this reason if nothing else stands in the way."""

FOLLOW_PATIENCE = 1800.0
"""Seconds without an answer after which following a job is given up; the job does not mind."""

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

    def probe(client: OpenAI) -> Any:
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


def upload(service: Service, path: Path) -> dict[str, Any]:
    """Send a file of rows.

    Returns:
        Its id and size there.

    Raises:
        TuneryError: refused, or failed again and again; HostedError: what arrived has another size.
    """
    doing = f"uploading {path.name}"

    def send(client: OpenAI) -> dict[str, Any]:
        patient = client.with_options(timeout=client_module.LONG_TIMEOUT)
        with open(path, "rb") as file:  # anew for each try: a dropped connection leaves it half read
            return as_dict(patient.files.create(file=file, purpose="fine-tune"))

    found = service.call(doing, send)
    size = path.stat().st_size
    arrived = found.get("bytes")
    if arrived and arrived != size:
        raise HostedError(f"{doing}: {size:,} bytes were sent and {arrived:,} arrived", "run the same command again")
    return {"id": found["id"], "bytes": arrived}


def content(service: Service, file: str) -> bytes:
    """The content of a file there."""
    return service.call(f"fetching {file}", lambda client: client.files.content(file).content)


def create(service: Service, request: Mapping[str, Any]) -> dict[str, Any]:
    """Make the job, once.

    A request whose answer was lost may have made it: a job on the same training file, which only this run uses, is
    taken for it. Where one came so late that there are two, the later ones are cancelled.
    """
    tries = 0

    def make(client: OpenAI) -> dict[str, Any]:
        nonlocal tries
        if tries:
            client_module.sleep(SETTLING)
        tries += 1
        patient = client.with_options(timeout=client_module.LONG_TIMEOUT)
        made = _made_on(client, request["training_file"])
        return made[0] if made else as_job(patient.fine_tuning.jobs.create(**request))

    made = service.call("creating the job", make)
    return find(service, request["training_file"]) or made


def find(service: Service, training_file: str) -> dict[str, Any] | None:
    """The one job on a training file, which only one run uses; later ones that still go on are cancelled."""
    made = service.call("looking for the job", lambda client: _made_on(client, training_file))
    for job in made[1:]:
        if job["status"] not in DONE:
            service.note(Note(f"{job['id']} is cancelled: it is the same job as {made[0]['id']}"))
            cancel(service, job["id"])
    return made[0] if made else None


def _made_on(client: OpenAI, training_file: str) -> list[dict[str, Any]]:
    """The jobs on a training file; those that still go on or have succeeded first, and of these the oldest."""
    import openai

    try:
        recent = client.fine_tuning.jobs.list(limit=_RECENT).data
    except (openai.NotFoundError, openai.BadRequestError):  # a server that lists none
        return []
    made = [as_job(job) for job in reversed(recent or ()) if job.training_file == training_file]
    return sorted(made, key=lambda job: job["status"] in ("failed", "cancelled"))


def as_dict(answer: Any) -> dict[str, Any]:
    """An object of the client as JSON values.

    Raises:
        TypeError, AttributeError: it is none.
    """
    values = answer.model_dump(mode="json", exclude_none=False, warnings=False)
    if not isinstance(values.get("id"), str):
        raise TypeError("an object without an id")
    return values


def as_job(answer: Any) -> dict[str, Any]:
    """A job of the client as JSON values.

    Raises:
        TypeError, AttributeError: it is none.
    """
    values = as_dict(answer)
    if not all(isinstance(values.get(name), str) for name in ("status", "model", "training_file")):
        raise TypeError("a job without a status, model or training file")
    return values


def retrieve(service: Service, job: str) -> dict[str, Any]:
    """The job as it is now."""
    return service.call(
        f"looking at {job}", lambda client: as_job(client.fine_tuning.jobs.retrieve(job)), patience=FOLLOW_PATIENCE
    )


def cancel(service: Service, job: str) -> dict[str, Any]:
    """Cancel the job; it is then described as it is."""
    return service.call(f"cancelling {job}", lambda client: as_job(client.fine_tuning.jobs.cancel(job)))


# --------------------------------------------------------------------------- events


class EventLog:
    """The events of a job, each once, in the order in which they happened; kept in a file, a line each."""

    def __init__(self, path: Path):
        self._path = path
        self.events = [event for event in read_lines(path) if "id" in event]
        self._seen = {event["id"] for event in self.events}

    def fetch(self, service: Service, job: str) -> list[dict[str, Any]]:
        """Those that are new, written down."""

        def newer(client: OpenAI) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
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


@dataclass
class Follower:
    """Looks at a job until it is done.

    Attributes:
        told: given each new event.
        changed: given the job whenever its status is another one.
    """

    service: Service
    log: EventLog
    told: Callable[[dict[str, Any]], None]
    changed: Callable[[dict[str, Any]], None]

    def follow(self, job_id: str) -> dict[str, Any]:
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
