"""Fine-tuning jobs, as the routes call them. All calls may come from any thread."""

from __future__ import annotations

import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from tunery.errors import ConfigError
from tunery.jsonl import JsonMapping
from tunery.openai_api.methods import METHODS
from tunery.paths import write_json
from tunery.serve.api_errors import ApiError, not_found, shorten
from tunery.serve.files import UPLOAD_PURPOSE, Files
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.jobs.outcome import Outcome
from tunery.serve.jobs.supervisor import Supervisor
from tunery.serve.jobs.translate import SEEDS, JobSpec, asked_of, check_defaults, trackers_of
from tunery.serve.records import FINAL, Checkpoint, Event, Job, Work, new_id
from tunery.serve.registry import ORGANIZATION, Registry
from tunery.serve.schemas import CreateJob
from tunery.serve.store import Page, R, Store, UnknownRecordError

PATIENCE_SECONDS = 60.0
"""How long a call to pause waits for the worker's checkpoint before it answers with the job as it is."""


class Jobs:
    """The fine-tuning jobs of a server.

    Args:
        home: the server's folder. One server at a time uses it.
        store, files, registry: of the same server.
        slots: jobs that train at once.
        task_defaults: settings for all jobs, as sections of a task file (lora, train, data, evaluate).
        python: the workers' interpreter.

    Raises:
        ConfigError: `task_defaults` are wrong.
    """

    def __init__(
        self,
        home: Path,
        store: Store,
        files: Files,
        registry: Registry,
        *,
        slots: int = 1,
        task_defaults: JsonMapping | None = None,
        patience: float = PATIENCE_SECONDS,
        python: str = sys.executable,
    ):
        self._home, self._folders = home, home / "jobs"
        self._store, self._files, self._registry = store, files, registry
        self._defaults = dict(task_defaults or {})
        self._patience = patience
        check_defaults(self._defaults)
        self._folders.mkdir(parents=True, exist_ok=True)
        self._outcome = Outcome(store, files)
        self._supervisor = Supervisor(store, files, self._folders, slots=slots, python=python)
        self._lock = FileLock(home / "server.lock", thread_local=False)

    # ----------------------------------------------------------------- life

    def start(self) -> None:
        """Take up what was running, and start the supervisor.

        Raises:
            ConfigError: another server uses this folder.
        """
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"another server is working in {self._home}", "stop it, or choose another folder with --home"
            ) from None
        self._files.recover()
        self._remove_orphans()
        self._supervisor.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Ask the workers to write a checkpoint and end, and wait so many seconds for them."""
        self._supervisor.stop(timeout)
        self._lock.release()

    def _remove_orphans(self) -> None:
        """Remove the folders of jobs whose creation a crash cut short."""
        for folder in self._folders.iterdir():
            if self._store.get(Job, folder.name) is None:
                shutil.rmtree(folder, ignore_errors=True)

    # ----------------------------------------------------------------- create

    def create(self, request: CreateJob) -> Job:
        """Create a job; its files are looked at after the call.

        Args:
            request: a request that has been read.

        Raises:
            ApiError: 400, an integration or a file that cannot be; 404, no such model.
        """
        base, adapter = self._registry.base_of(request.model)
        trackers, environment = trackers_of(request)
        files = {"training_file": request.training_file, "validation_file": request.validation_file}
        given = {param: file_id for param, file_id in files.items() if file_id}
        for param, file_id in given.items():
            self._check_file(param, file_id)
        job_id = new_id("ftjob-")
        spec = JobSpec(
            base=base,
            method=request.kind,
            seed=secrets.randbelow(SEEDS) if request.seed is None else request.seed,
            asked=asked_of(request),
            has_validation="validation_file" in given,
            goes_on=adapter is not None,
            trackers=trackers,
            environment={**_resuming(job_id), **environment} if trackers else {},
            defaults=self._defaults,
        )
        folder = JobFolder.of(self._folders, job_id)
        try:
            self._fill(folder, spec, given, adapter)
            job = self._keep(job_id, spec, request)
        except BaseException:
            shutil.rmtree(folder.root, ignore_errors=True)
            raise
        self._supervisor.wake()
        return job

    def _check_file(self, param: str, file_id: str) -> None:
        try:
            file = self._files.get(file_id)
        except ApiError:
            raise ApiError(
                400, f"Invalid '{param}': no such File: {shorten(file_id)}", code="file_not_found", param=param
            ) from None
        if file.purpose != UPLOAD_PURPOSE:
            raise ApiError(
                400,
                f"Invalid '{param}': {file_id} has purpose {file.purpose}, not {UPLOAD_PURPOSE}.",
                code="invalid_file",
                param=param,
            )

    def _fill(self, folder: JobFolder, spec: JobSpec, files: Mapping[str, str], adapter: Path | None) -> None:
        """Give the job's folder all that its workers need, so that nothing which is deleted later is missed."""
        folder.root.mkdir(parents=True)
        for param, file_id in files.items():
            self._files.link(file_id, folder.data(param))
        if adapter is not None:
            shutil.copytree(adapter, folder.start)
        write_json(folder.request, asdict(spec))

    def _keep(self, job_id: str, spec: JobSpec, request: CreateJob) -> Job:
        hyperparameters = {name: spec.asked.get(name, "auto") for name in _shown(spec.method)}
        job = Job(
            id=job_id,
            created_at=int(time.time()),
            model=request.model,
            seed=spec.seed,
            training_file=request.training_file,
            validation_file=request.validation_file or None,
            hyperparameters={name: value for name, value in hyperparameters.items() if name != "beta"},
            method={"type": spec.method, spec.method: {"hyperparameters": hyperparameters}},
            metadata=dict(request.metadata) if request.metadata else None,
            integrations=[integration.model_dump() for integration in request.integrations or ()] or None,
            organization_id=ORGANIZATION,
            user_provided_suffix=request.suffix,
        )
        name = f"ft:{_root_name(request.model)}:{ORGANIZATION}:{request.suffix or ''}:{new_id('', 8)}"
        names = " and ".join(f"{param.replace('_', ' ')}: {getattr(request, param)}" for param in spec.params)
        with self._store.transaction():
            self._store.add(job)
            self._store.add(Work(job_id, spec.base, name))
            self._outcome.say(job_id, f"Created fine-tuning job: {job_id}", key=("created",))
            self._outcome.say(job_id, f"Validating {names}", key=("validating",))
        return job

    # ----------------------------------------------------------------- look

    def get(self, job_id: str) -> Job:
        """A job.

        Raises:
            ApiError: 404, there is no such job.
        """
        job = self._store.get(Job, job_id)
        if job is None:
            raise not_found("fine-tuning job", job_id)
        return job

    def list(self, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None) -> Page[Job]:
        """A page of the jobs, newest first.

        Args:
            metadata: only those that have these pairs.
        """
        return self._page(Job, after, limit, metadata=metadata)

    def events(self, job_id: str, after: str | None = None, limit: int = 20) -> Page[Event]:
        """A page of a job's events, newest first."""
        return self._page(Event, after, limit, owner=self.get(job_id).id)

    def checkpoints(self, job_id: str, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
        """A page of a job's checkpoints, newest first."""
        return self._page(Checkpoint, after, limit, owner=self.get(job_id).id)

    def _page(
        self,
        kind: type[R],
        after: str | None,
        limit: int,
        *,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[R]:
        try:
            return self._store.list(kind, owner=owner, metadata=metadata, after=after, limit=limit)
        except UnknownRecordError:
            raise ApiError(400, f"Invalid 'after': no such id: {shorten(str(after))}", param="after") from None

    def folder(self, job_id: str) -> JobFolder:
        """Where a job's files lie."""
        return JobFolder.of(self._folders, self.get(job_id).id)

    def run_dir(self, job_id: str) -> Path:
        """A job's run directory, which may not exist yet."""
        return self.folder(job_id).run.root

    # ----------------------------------------------------------------- change

    def cancel(self, job_id: str) -> Job:
        """Cancel a job for good. Its worker ends soon after; checkpoints that it has written stay.

        Raises:
            ApiError: 404, no such job; 400, it is over already.
        """
        while True:
            job = self._unfinished(job_id, "cancelled")
            with self._store.transaction():
                moved = self._store.move(
                    job_id, "cancelled", expected={job.status}, finished_at=int(time.time()), estimated_finish=None
                )
                if moved:
                    self._store.update(Work, job_id, wanted=None)
                    self._outcome.say(job_id, "The job has been cancelled", key=("cancelled",))
            if moved:
                self._supervisor.wake()
                return moved

    def pause(self, job_id: str) -> Job:
        """Pause a job: its worker writes a checkpoint, ends, and frees the machine.

        Returns:
            The job: paused, unless its worker needs longer than our patience (then it will be), or has just finished.

        Raises:
            ApiError: 404, no such job; 400, it is over already.
        """
        job = self._unfinished(job_id, "paused")
        with self._store.transaction():
            job = self.get(job_id)
            if job.status in ("validating_files", "queued"):
                self._outcome.paused(job, "The job is paused")
            elif job.status == "running":
                self._store.update(Work, job_id, wanted="pause")
        self._supervisor.wake()
        self._supervisor.wait(lambda: self._is_paused_or_over(job_id), self._patience)
        return self.get(job_id)

    def _is_paused_or_over(self, job_id: str) -> bool:
        work = self._store.get(Work, job_id)
        return work is None or work.wanted is None or self.get(job_id).status in FINAL

    def resume(self, job_id: str) -> Job:
        """Let a paused job resume where it stopped.

        Raises:
            ApiError: 404, no such job; 400, it is not paused.
        """
        self._unfinished(job_id, "resumed")
        with self._store.transaction():
            job, work = self.get(job_id), self._store.get(Work, job_id)
            validated = work is not None and work.validated
            moved = self._store.move(job_id, "queued" if validated else "validating_files", expected={"paused"})
            if moved is None and (work is None or work.wanted is None):
                raise ApiError(
                    400,
                    f"The job {job_id} is {job.status}; only a paused job can be resumed.",
                    code="invalid_job_status",
                    param="id",
                )
            self._store.update(Work, job_id, wanted=None, crashes=0)
            if moved:
                self._outcome.say(job_id, "The job is resumed")
        self._supervisor.wake()
        return self.get(job_id)

    def _unfinished(self, job_id: str, wanted: str) -> Job:
        job = self.get(job_id)
        if job.status in FINAL:
            has = "is" if job.status == "cancelled" else "has"
            raise ApiError(
                400,
                f"The job {job_id} {has} {job.status} and cannot be {wanted}.",
                code="invalid_job_status",
                param="id",
            )
        return job


def _shown(method: str) -> tuple[str, ...]:
    return METHODS[method].hyperparameters


def _resuming(job_id: str) -> dict[str, str]:
    """Variables that make every worker of a job write into one run of wandb."""
    return {"WANDB_NAME": job_id, "WANDB_RUN_ID": job_id, "WANDB_RESUME": "allow"}


def _root_name(model: str) -> str:
    """What a fine-tuned model's name begins with: of "ft:NAME:…" NAME, so that names do not grow with each job."""
    return model.split(":")[1] if model.startswith("ft:") else model
