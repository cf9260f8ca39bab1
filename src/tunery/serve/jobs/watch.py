"""From what a worker writes to what a client sees: events, checkpoints, and when the job may be done.

Everything is read from files in the job's folder, and ids follow from the job, the step and the kind of thing, so it
does no harm to read a file again: after a restart of the server, or when a worker that was killed has begun anew behind
its last checkpoint.
"""

from __future__ import annotations

import time

from tunery.config import Task
from tunery.jsonl import JsonMapping, JsonObject, Tail
from tunery.openai_api.job_metrics import OPENAI_NAMES
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.records import Checkpoint, Event, Job, Work, derived_id
from tunery.serve.store import Store
from tunery.training.checkpoint import checkpoint_steps

PACE_STEPS = 20
"""Steps whose pace says when the job will be done."""

_LEFT_OUT = ("step", "epoch", "learning_rate", "grad_norm", "seconds")


class Watch:
    """Follows one job's run.

    Args:
        store: where events and checkpoints go.
        job_id: of the job.
        folder: of the job.
        full_validation: the validation during training uses all rows of the validation file.
    """

    def __init__(self, store: Store, job_id: str, folder: JobFolder, *, full_validation: bool = False):
        self._store, self._job_id, self._folder = store, job_id, folder
        self._full_validation = full_validation
        self._rewind()
        self._total: int | None = None
        self._eval_every: int | None = None
        self._by_step: dict[int, JsonObject] = {}
        self._step = 0
        self._pace: list[float] = []
        self._known: set[int] = set()

    def poll(self, *, final: bool = False) -> None:
        """Take up what is new.

        Args:
            final: the run will not go on, so a step is not held back for its validation.
        """
        steps = checkpoint_steps(self._folder.run.checkpoints)  # first: their lines were written before them
        metrics = self._metrics.read()  # then these: the plan was written before them
        status = self._status.read()
        if not status and not metrics and set(steps) == self._known and not (final and self._held is not None):
            return
        if self._metrics.replaced:
            self._held = None  # it comes again
        try:
            with self._store.transaction():
                self._take(steps, metrics, status, final)
        except BaseException:  # a full disk, say: all is read again next time
            self._rewind()
            raise
        self._known = set(steps)

    def _rewind(self) -> None:
        self._status, self._metrics = Tail(self._folder.status), Tail(self._folder.run.metrics)
        self._held: int | None = None

    def _take(self, steps: list[int], metrics: list[JsonObject], status: list[JsonObject], final: bool) -> None:
        for line in status:
            self._take_status(line)
        new = [step for step in steps if step not in self._known]
        for line in metrics:
            while new and line.get("step", 0) > new[0]:
                self._add_checkpoint(new.pop(0))
            self._take_metrics(line)
        if final:
            self._release()
        for step in new:
            self._add_checkpoint(step)
        self._drop_checkpoints(steps)
        if metrics:
            self._estimate()

    # ----------------------------------------------------------------- status

    def _take_status(self, line: JsonMapping) -> None:
        if line.get("kind") == "plan":
            self._total, self._eval_every = line["total"], line["eval_every"]
        elif line.get("kind") == "note":
            self._add(Event(self._id("note", line["text"]), int(line["at"]), line["text"], line["level"]))

    def _id(self, *what: object) -> str:
        return derived_id("ftevent-", self._job_id, *what)

    def _add(self, event: Event) -> None:
        self._store.add(event, owner=self._job_id)

    # ----------------------------------------------------------------- metrics

    def _take_metrics(self, line: JsonObject) -> None:
        """A step's line is held back until its validation follows, so that one event tells both."""
        step = line.get("step")
        if not isinstance(step, int):
            return
        if self._held is not None and self._held != step:
            self._release()
        named = {OPENAI_NAMES.get(name, name): value for name, value in line.items() if _is_shown(name)}
        if "valid_loss" not in line:
            self._by_step[step] = named
            self._pace = [*self._pace, float(line.get("seconds", 0.0))][-PACE_STEPS:]
        else:
            if self._full_validation:
                named |= {f"full_{name}": named[name] for name in _FULL if name in named}
            self._by_step[step] = {**self._by_step.get(step, {}), **named}
        self._step = self._held = step
        if "valid_loss" in line or not self._validation_follows(step):
            self._release()

    def _validation_follows(self, step: int) -> bool:
        return self._eval_every is not None and (step % self._eval_every == 0 or step == self._total)

    def _release(self) -> None:
        step, self._held = self._held, None
        if step is None or "train_loss" not in (values := self._by_step[step]):
            return
        total = self._total or step
        words = f"Step {step}/{total}: training loss={values['train_loss']:.2f}"
        if "valid_loss" in values:
            words += f", validation loss={values['valid_loss']:.2f}"
        data = {"step": step, "total_steps": total, **values}
        self._add(Event(self._id("step", step), int(time.time()), words, type="metrics", data=data))

    # ----------------------------------------------------------------- checkpoints

    def _drop_checkpoints(self, steps: list[int]) -> None:
        """Forget the checkpoints that newer ones have taken the place of."""
        for listed in self._store.list(Checkpoint, owner=self._job_id).data:
            if listed.step_number not in steps and not self._folder.exported(listed.step_number).is_dir():
                self._store.delete(Checkpoint, listed.id)

    def _add_checkpoint(self, step: int) -> None:
        work = self._store.get(Work, self._job_id)
        assert work is not None  # kept with the job
        now = int(time.time())
        checkpoint = Checkpoint(
            id=derived_id("ftckpt_", self._job_id, step),
            created_at=now,
            fine_tuned_model_checkpoint=f"{work.name}:ckpt-step-{step}",
            fine_tuning_job_id=self._job_id,
            step_number=step,
            metrics={"step": step, **self._by_step.get(step, {})},
        )
        self._store.add(checkpoint, owner=self._job_id)
        self._add(Event(self._id("checkpoint", step), now, f"Checkpoint created at step {step}"))

    # ----------------------------------------------------------------- time

    def _estimate(self) -> None:
        """When the job may be done, by the pace of the last steps."""
        if self._total is None or not self._pace:
            return
        left = self._total - self._step
        finish = int(time.time() + left * sum(self._pace) / len(self._pace))
        self._store.update(Job, self._job_id, estimated_finish=finish)


_FULL = ("valid_loss", "valid_mean_token_accuracy")


def _is_shown(name: str) -> bool:
    return name not in _LEFT_OUT and not name.endswith("_per_second")


def validates_on_all(task: Task, validation_examples: int) -> bool:
    """Whether the validation during training uses every row of the validation file."""
    return task.train.eval_rows is None or validation_examples <= task.train.eval_rows
