"""The thread that starts workers, follows them, and writes down how they end.

Jobs run in the order they were created, as many at once as there are slots. The look at a job's files has a lane of its
own, one job at a time, so that a new job's mistakes are found while another one trains.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import TuneryError
from tunery.paths import read_json
from tunery.serve.files import Files
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.jobs.outcome import Outcome
from tunery.serve.jobs.process import Worker, is_locked
from tunery.serve.jobs.watch import Watch, validates_on_all
from tunery.serve.records import FINAL, File, Job, JobStatus, Work
from tunery.serve.store import Store
from tunery.task_file import load_task

POLL_SECONDS = 0.3
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 10.0
"""Between two attempts to start a process that could not be started."""

logger = logging.getLogger(__name__)


@dataclass
class _Charge:
    """A worker in our care."""

    worker: Worker
    watch: Watch | None


class Supervisor:
    """Runs the jobs of a server.

    Args:
        store: of the jobs.
        files: where results go; swept of expired files now and then.
        jobs: the folder of the jobs' folders.
        slots: jobs that train at once.
        grace: seconds that a cancelled job's worker has to end.
        python: the workers' interpreter.
    """

    def __init__(
        self,
        store: Store,
        files: Files,
        jobs: Path,
        *,
        slots: int = 1,
        grace: float = 30.0,
        python: str = sys.executable,
    ):
        self._store, self._files, self._jobs = store, files, jobs
        self._slots, self._grace, self._python = slots, grace, python
        self._outcome = Outcome(store, files)
        self._charges: list[_Charge] = []
        self._orphans: list[str] = []
        self._condition = threading.Condition()
        self._woken = self._stopping = self._abandoned = False
        self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)
        self._next_sweep = self._not_before = 0.0

    # ----------------------------------------------------------------- from other threads

    def start(self) -> None:
        """Take up what an earlier server left, and go to work."""
        self._orphans = [job.id for job in self._in_status("running")]
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Ask the workers to write a checkpoint and end, and wait for them; what takes longer ends on its own, and the
        next server takes it up."""
        with self._condition:
            self._stopping = True
        self.wake()
        self._thread.join(timeout)
        self._abandoned = True
        self._thread.join(10 * POLL_SECONDS)

    def wake(self) -> None:
        """Something has changed: look now."""
        with self._condition:
            self._woken = True
            self._condition.notify_all()

    def wait(self, done: Callable[[], bool], timeout: float) -> None:
        """Wait until something is done, looking again whenever this thread has been around."""
        deadline = time.monotonic() + timeout
        with self._condition:
            while not done() and time.monotonic() < deadline and self._thread.is_alive():
                self._condition.wait(POLL_SECONDS)

    # ----------------------------------------------------------------- the loop

    def _loop(self) -> None:
        while not self._abandoned:
            for charge in list(self._charges):
                self._guarded(lambda charge=charge: self._look_after(charge))
            if self._stopping and not self._charges:
                return
            if not self._stopping:
                for task in (self._adopt, self._start_validation, self._start_runs, self._sweep):
                    self._guarded(task)
            with self._condition:
                self._condition.notify_all()
                if not self._woken:
                    self._condition.wait(POLL_SECONDS)
                self._woken = False

    def _guarded(self, task: Callable[[], None]) -> None:
        """One thing that goes wrong (a full disk, say) must not stop the others; it is tried again next time round."""
        try:
            task()
        except Exception:
            logger.exception("jobs: something went wrong and is tried again")
            self._not_before = time.monotonic() + RETRY_SECONDS

    def _look_after(self, charge: _Charge) -> None:
        worker = charge.worker
        code = worker.exit_code()
        if code is None:
            if charge.watch:
                charge.watch.poll()
            self._stop_if_wanted(worker)
            return
        self._outcome.end(worker, code, charge.watch)
        worker.let_go()
        self._charges.remove(charge)

    def _stop_if_wanted(self, worker: Worker) -> None:
        job, work = self._store.get(Job, worker.job_id), self._store.get(Work, worker.job_id)
        cancelled = job is None or job.status == "cancelled"
        paused = work is not None and work.wanted == "pause"
        if self._stopping or cancelled or paused or (job is not None and job.status == "paused"):
            worker.ask_to_stop()
        since = worker.asked_to_stop
        if cancelled and since is not None and time.monotonic() - since > self._grace:
            worker.kill()

    def _sweep(self) -> None:
        """Delete files whose time is over, and with every deleted file the links of jobs that need it no more."""
        if time.monotonic() < self._next_sweep:
            return
        self._next_sweep = time.monotonic() + SWEEP_SECONDS
        self._files.sweep()
        for job in self._store.list(Job, where={"status": tuple(FINAL)}).data:
            for param, file_id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
                if file_id is not None and self._store.get(File, file_id) is None:
                    self._folder(job.id).data(param).unlink(missing_ok=True)

    # ----------------------------------------------------------------- starting

    def _adopt(self) -> None:
        """Queue the jobs that an earlier server was running, once their workers are gone."""
        for job_id in list(self._orphans):
            folder = self._folder(job_id)
            if is_locked(folder):
                continue
            self._watch(job_id, folder).poll()
            job, work = self._store.get(Job, job_id), self._store.get(Work, job_id)
            if job is not None and work is not None and job.status == "running":
                if work.wanted == "pause":
                    self._outcome.paused(job, "The job is paused")
                else:
                    self._outcome.taken_up(job)
            self._orphans.remove(job_id)

    def _start_validation(self) -> None:
        if any(charge.worker.validating for charge in self._charges) or time.monotonic() < self._not_before:
            return
        for job in self._in_status("validating_files"):
            folder = self._folder(job.id)
            if not is_locked(folder):
                worker = Worker(job.id, folder, validating=True, python=self._python)
                self._charges.append(_Charge(worker, None))
                return

    def _start_runs(self) -> None:
        for job in self._in_status("queued"):
            running = [charge for charge in self._charges if not charge.worker.validating]
            if len(running) + len(self._orphans) >= self._slots or time.monotonic() < self._not_before:
                return
            work = self._store.get(Work, job.id)
            if work is not None and work.wanted == "pause":
                self._outcome.paused(job, "The job is paused")
            elif all(charge.worker.job_id != job.id for charge in self._charges):
                self._start_run(job.id)

    def _start_run(self, job_id: str) -> None:
        folder = self._folder(job_id)
        if is_locked(folder) or not self._store.move(job_id, "running", expected={"queued"}):
            return
        try:
            worker = Worker(job_id, folder, validating=False, python=self._python)
        except BaseException:
            self._store.move(job_id, "queued", expected={"running"})
            raise
        self._charges.append(_Charge(worker, self._watch(job_id, folder)))
        self._outcome.say(job_id, "Fine-tuning job started", key=("started",))

    def _watch(self, job_id: str, folder: JobFolder) -> Watch:
        full = False
        with contextlib.suppress(OSError, ValueError, KeyError, TuneryError):
            full = validates_on_all(load_task(folder.task), read_json(folder.facts)["validation_examples"])
        return Watch(self._store, job_id, folder, full_validation=full)

    def _in_status(self, status: JobStatus) -> list[Job]:
        """The jobs in this status, the oldest first."""
        return self._store.list(Job, where={"status": status}, order="asc").data

    def _folder(self, job_id: str) -> JobFolder:
        return JobFolder.of(self._jobs, job_id)
