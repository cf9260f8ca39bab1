"""Everything of a fine-tuning job that lies on a server, in a folder here: to be kept when the server forgets it.

capture/
  job.json          the job as the server describes it: model, method, hyperparameters, metadata
  training.jsonl    the rows it was trained on
  validation.jsonl  those it was validated on, if there were any
  events.jsonl      what the server said of it
  results.csv       its metrics by step
  answers.jsonl     what the tuned model answers to held-out rows
  manifest.json     where all this comes from, with the SHA-256 of each file
"""

from __future__ import annotations

import datetime
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.errors import CheckpointError, ConfigError, HostedError
from tunery.hosted.client import Service
from tunery.hosted.job import EventLog, as_job, content, retrieve
from tunery.jsonl import JsonObject
from tunery.paths import disk_errors, file_sha256, read_json, write_atomic, write_json
from tunery.progress import Note, Say
from tunery.versions import version_of

if TYPE_CHECKING:
    from openai import OpenAI

TRAINING, VALIDATION = "training.jsonl", "validation.jsonl"
JOB, ANSWERS, EVENTS, RESULTS, MANIFEST = "job.json", "answers.jsonl", "events.jsonl", "results.csv", "manifest.json"

_JOBS_SEARCHED = 1000
"""Jobs looked through for the one that made a model."""


@dataclass(frozen=True)
class Capture:
    """A captured job.

    Attributes:
        folder: see the module.
        job: the content of job.json; {} where only files were given.
        address: the server it comes from; "" for files.
    """

    folder: Path
    job: JsonObject
    address: str = ""

    @property
    def training(self) -> Path:
        """The rows trained on."""
        return self.folder / TRAINING

    @property
    def validation(self) -> Path | None:
        """The rows validated on, if there are any."""
        path = self.folder / VALIDATION
        return path if path.exists() else None

    @property
    def answers(self) -> Path:
        """The tuned model's answers."""
        return self.folder / ANSWERS

    @property
    def tuned_model(self) -> str | None:
        """The name by which the tuned model answers, or answered."""
        return self.job.get("fine_tuned_model")

    @property
    def name(self) -> str:
        """What a person calls it: the job, or the file of rows."""
        return str(self.job.get("id") or self.folder.parent.name)


# --------------------------------------------------------------------------- from a server


def fetch(service: Service, source: str, folder: Path, files: dict[str, Path], note: Say) -> Capture:
    """Fetch a job and its files. What is there already, whole, is not fetched again.

    Args:
        source: a job ("ftjob-…") or the model it made ("ft:…").
        files: the person's own copies, by name (TRAINING, VALIDATION), for those that the server has no longer.

    Raises:
        TuneryError: the job or its training file cannot be had. Without the other files it goes on, and says so.
    """
    job = _job(service, source)
    note(Note(f"{job['id']}: {job['model']}, {job['status']}"))
    _require_same_job(folder, job)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JOB, job)
    wanted = {TRAINING: job.get("training_file"), VALIDATION: job.get("validation_file")}
    for name, file in wanted.items():
        if name in files:
            _copy(files[name], folder / name)
        elif file and not _is_whole(folder, name):
            _fetch_rows(service, str(file), folder / name, note)
    _fetch_the_rest(service, job, folder, note)
    capture = Capture(folder, job, service.address)
    write_manifest(capture, {name: str(file) for name, file in wanted.items() if file})
    return capture


def _job(service: Service, source: str) -> JsonObject:
    if not source.startswith("ft:"):
        return retrieve(service, source)

    def search(client: OpenAI) -> JsonObject | None:
        for number, job in enumerate(client.fine_tuning.jobs.list(limit=100)):
            if job.fine_tuned_model == source:
                return as_job(job)
            if number == _JOBS_SEARCHED:
                return None
        return None

    found = service.call(f"looking for the job that made {source}", search)
    if found is None:
        raise HostedError(f"no job of this account at {service.address} made {source}", "name the job itself: ftjob-…")
    return found


def _require_same_job(folder: Path, job: JsonObject) -> None:
    try:
        there = read_json(folder / JOB).get("id")
    except FileNotFoundError:
        return
    except (ValueError, AttributeError) as error:
        raise _damaged(folder / JOB, error) from None
    if there != job["id"]:
        raise ConfigError(f"{folder} holds {there}, not {job['id']}", "name another folder with --out")


def _is_whole(folder: Path, name: str) -> bool:
    """Whether a file lies there as the manifest says."""
    try:
        known = read_json(folder / MANIFEST)["files"][name]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (folder / name).is_file() and file_sha256(folder / name) == known


def _fetch_rows(service: Service, file: str, target: Path, note: Say) -> None:
    try:
        found = content(service, file)
    except HostedError as error:
        option = "--files" if target.name == TRAINING else "--validation"
        lost = HostedError(
            f"{target.name} cannot be fetched: {error.message}",
            f"if you have your own copy, name it: {option} FILE.jsonl",
        )
        if target.name == TRAINING:
            raise lost from None
        target.unlink(missing_ok=True)  # what lies there is not what was captured
        note(Note(f"left out: {lost}"))
        return
    write_atomic(target, found)
    note(Note(f"{target.name}: {len(found):,} bytes ({file})"))


def _fetch_the_rest(service: Service, job: JsonObject, folder: Path, note: Say) -> None:
    """What is good to have, and does not stand in the way if it cannot be had."""
    try:
        EventLog(folder / EVENTS).fetch(service, job["id"])
    except HostedError as error:
        note(Note(f"left out: {error.message}"))
    for file in job.get("result_files") or ():
        try:
            write_atomic(folder / RESULTS, content(service, str(file)))
        except HostedError as error:
            note(Note(f"left out: {error.message}"))


# --------------------------------------------------------------------------- from files, and from before


def from_files(folder: Path, files: dict[str, Path]) -> Capture:
    """Take the person's own files, where the server has nothing any more."""
    if (folder / JOB).exists():
        raise ConfigError(f"{folder} holds a job", "name another folder with --out")
    for name, path in files.items():
        _copy(path, folder / name)
    capture = Capture(folder, {})
    write_manifest(capture, {name: str(path) for name, path in files.items()})
    return capture


def _copy(path: Path, target: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", "check the path")
    if target.exists() and path.samefile(target):
        return
    with disk_errors(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def is_capture(path: Path) -> bool:
    """Whether a folder is a capture, or holds one."""
    return any((folder / MANIFEST).is_file() for folder in (path, path / "capture"))


def open_capture(path: Path) -> Capture:
    """A folder that was captured earlier.

    Raises:
        CheckpointError: a file in it is damaged, gone, or not the one that was captured.
    """
    folder = (path if (path / MANIFEST).is_file() else path / "capture").resolve()
    try:
        manifest = read_json(folder / MANIFEST)
        job = read_json(folder / JOB) if (folder / JOB).exists() else {}
        names = list(manifest["files"])
        address = str(manifest["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / MANIFEST, error) from None
    if changed := [name for name in names if not _is_whole(folder, name)]:
        raise CheckpointError(
            f"{folder}: {', '.join(changed)} {'is' if len(changed) == 1 else 'are'} not as captured",
            "restore what was captured; for other rows, name the job and give them with --files and --out NEW_FOLDER",
        )
    return Capture(folder, job, address)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {error}", "restore it, or capture the job again with --out NEW_FOLDER"
    )


def write_manifest(capture: Capture, sources: dict[str, str]) -> None:
    """manifest.json, for the files that lie there and stay as they are.

    Args:
        sources: name → file on the server, or path.
    """
    kept = [name for name in (JOB, TRAINING, VALIDATION, RESULTS) if (capture.folder / name).exists()]
    write_json(
        capture.folder / MANIFEST,
        {
            "tunery": version_of("tunery"),
            "captured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "address": capture.address,
            "job": capture.job.get("id"),
            "tuned_model": capture.tuned_model,
            "files": {
                name: {
                    "sha256": file_sha256(capture.folder / name),
                    "bytes": (capture.folder / name).stat().st_size,
                    **({"from": sources[name]} if name in sources else {}),
                }
                for name in kept
            },
        },
    )
