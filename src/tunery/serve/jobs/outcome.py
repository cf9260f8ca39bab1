"""What the end of a worker means for its job.

| the worker ended | the job |
| --- | --- |
| 0 | validating: is queued; training: has succeeded |
| 75 (full disk) | is paused, with an event that says why; it can be resumed |
| after it was asked to pause | is paused |
| after it was asked to stop, by a server that ends | is queued: it resumes when a server runs again |
| 1, 2, 3, 4, 5 | has failed, for the reason that the worker wrote down |
| any other way | is tried again from its last checkpoint; after three deaths without a new checkpoint it has failed |

A change and its events are one transaction, and none is made twice: `end` can be called again when it could not finish.
"""

from __future__ import annotations

import logging
import time
from typing import Literal

from tunery.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ResumableError,
    TuneryError,
)
from tunery.jsonl import JsonObject, Tail
from tunery.openai_api.job_metrics import RESULTS_FILENAME, results_csv
from tunery.paths import read_json
from tunery.serve.files import Files
from tunery.serve.jobs.job_folder import JobFolder, read_error
from tunery.serve.jobs.process import Worker, describe_exit, last_lines
from tunery.serve.jobs.watch import Watch
from tunery.serve.records import Event, Job, JobError, JobStatus, Model, Work, derived_id, new_id
from tunery.serve.store import Store
from tunery.training.checkpoint import checkpoint_steps

RETRIES = 3
logger = logging.getLogger(__name__)
Level = Literal["info", "warn", "error"]

_RESUMABLE = ResumableError.exit_code
_FAILURES = {
    kind.exit_code for kind in (TuneryError, ConfigError, DataError, AdapterError, CheckpointError, DivergedError)
}
_WORKING: tuple[JobStatus, ...] = ("validating_files", "running")


class Outcome:
    """Writes down what became of jobs.

    Args:
        store: of the jobs.
        files: where results go.
    """

    def __init__(self, store: Store, files: Files):
        self._store, self._files = store, files

    def end(self, worker: Worker, code: int, watch: Watch | None) -> None:
        """A worker has ended with this exit code (negative: by that signal)."""
        job = self._store.get(Job, worker.job_id)
        work = self._store.get(Work, worker.job_id)
        assert job is not None  # jobs are not deleted
        assert work is not None
        try:
            self._end(job, work, worker, code, watch)
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:  # what it left is not what it should be
            logger.exception("jobs: the end of %s cannot be understood", job.id)
            self.fail(job, JobError("server_error", f"What the worker left cannot be read ({type(error).__name__})"))

    def _end(self, job: Job, work: Work, worker: Worker, code: int, watch: Watch | None) -> None:
        if code == 0 and worker.validating:
            self._validated(job, worker.folder)
        elif code == 0:
            self._succeeded(job, work, worker.folder, watch)
        elif job.status not in _WORKING:  # cancelled, or paused while its files were looked at
            if watch:
                watch.poll(final=job.status == "cancelled")
        elif code in _FAILURES:
            self._failed(job, worker, watch)
        else:
            if watch:
                watch.poll()
            self._stopped(job, work, worker, code)

    # ----------------------------------------------------------------- good ends

    def _validated(self, job: Job, folder: JobFolder) -> None:
        facts = read_json(folder.facts)
        asked = {name: value for name, value in facts["hyperparameters"].items() if name != "beta"}
        kind = job.method["type"]
        method = {"type": kind, kind: {"hyperparameters": facts["hyperparameters"]}}
        with self._store.transaction():
            self._store.update(Job, job.id, hyperparameters=asked, method=method)
            self._store.update(Work, job.id, validated=True, crashes=0)
            for text in facts["warnings"]:
                self.say(job.id, text, "warn", key=("note", text))
            if self._store.move(job.id, "queued", expected={"validating_files"}):
                self.say(job.id, "Files validated, moving job to queued state", key=("queued",))

    def _succeeded(self, job: Job, work: Work, folder: JobFolder, watch: Watch | None) -> None:
        if watch:
            watch.poll(final=True)
        receipt = read_json(folder.run.receipt)
        table = results_csv(Tail(folder.run.metrics).read())
        results = self._files.add_result(derived_id("file-", job.id, "results"), RESULTS_FILENAME, table)
        now = int(time.time())
        with self._store.transaction():
            done = self._store.move(
                job.id,
                "succeeded",
                expected={"running"},
                fine_tuned_model=work.name,
                finished_at=now,
                estimated_finish=None,
                trained_tokens=receipt["tokens"]["data"],
                result_files=[results.id],
            )
            if done is None:  # it was cancelled in its last moment
                return
            self._store.add(Model(work.name, work.base, now), owner=job.id)
            self._store.update(Work, job.id, wanted=None)
            for text in receipt["warnings"]:
                self.say(job.id, text, "warn", key=("note", text))
            self.say(job.id, f"New fine-tuned model created: {work.name}", key=("model",))
            self.say(job.id, "The job has successfully completed", key=("succeeded",))

    # ----------------------------------------------------------------- other ends

    def _failed(self, job: Job, worker: Worker, watch: Watch | None) -> None:
        if watch:
            watch.poll(final=True)
        found = read_error(worker.folder) or {
            "code": "server_error",
            "message": f"The worker gave up without a reason. Its last words: {last_lines(worker.folder.log)}",
            "param": None,
        }
        self.fail(job, JobError(found["code"], found["message"], found["param"]))

    def fail(self, job: Job, error: JobError) -> None:
        """The job has failed for this reason."""
        with self._store.transaction():
            failed = self._store.move(
                job.id,
                "failed",
                expected={job.status},
                error=error,
                finished_at=int(time.time()),
                estimated_finish=None,
            )
            if failed:
                self.say(job.id, error.message, "error", data={"error_code": error.code}, key=("failed",))

    def _stopped(self, job: Job, work: Work, worker: Worker, code: int) -> None:
        """It may resume: now, or when someone says so."""
        if work.wanted == "pause" and job.status == "running":
            self.paused(job, "The job is paused")
        elif code == _RESUMABLE:
            found = read_error(worker.folder)
            message = found["message"] if found else "The server's disk is full: free some space, and resume the job"
            self.paused(job, message, "error")
        elif worker.asked_to_stop is not None:
            self._store.move(job.id, "queued", expected={"running"}, estimated_finish=None)
        else:
            self._crashed(job, work, worker, code)

    def paused(self, job: Job, message: str, level: Level = "info") -> None:
        """The job waits until it is resumed."""
        with self._store.transaction():
            self._store.update(Work, job.id, wanted=None)
            if self._store.move(job.id, "paused", expected={job.status}, estimated_finish=None):
                self.say(job.id, message, level)

    def taken_up(self, job: Job) -> None:
        """A job that ran when the last server ended."""
        with self._store.transaction():
            if self._store.move(job.id, "queued", expected={"running"}, estimated_finish=None):
                self.say(job.id, "The server has started again; the job resumes from its last checkpoint", "warn")

    def _crashed(self, job: Job, work: Work, worker: Worker, code: int) -> None:
        steps = checkpoint_steps(worker.folder.run.checkpoints)
        step = steps[-1] if steps else 0
        crashes = 1 if step > work.crash_step else work.crashes + 1
        ended = describe_exit(code)
        if crashes > RETRIES:
            words = last_lines(worker.folder.log)
            message = f"The job's worker died {crashes} times without getting further, the last time by {ended}. "
            self.fail(job, JobError("worker_crashed", message + (f"Its last words: {words}" if words else "")))
            return
        with self._store.transaction():
            self._store.update(Work, job.id, crashes=crashes, crash_step=step)
            if job.status == "running":
                self._store.move(job.id, "queued", expected={"running"}, estimated_finish=None)
            again = f"resumes from step {step}" if step else "begins again"
            self.say(job.id, f"The job's worker has died ({ended}); the job {again}", "warn")

    # ----------------------------------------------------------------- events

    def say(
        self,
        job_id: str,
        message: str,
        level: Level = "info",
        *,
        data: JsonObject | None = None,
        key: tuple[object, ...] | None = None,
    ) -> None:
        """Add an event.

        Args:
            key: what it is about; said under the same key again, it is kept once.
        """
        event_id = new_id("ftevent-") if key is None else derived_id("ftevent-", job_id, *key)
        self._store.add(Event(event_id, int(time.time()), message, level, data=data), owner=job_id)
