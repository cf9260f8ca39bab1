"""The training loop, on one page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunery.config import TrainConfig
from tunery.data.batching import Row, step_rows
from tunery.errors import StoppedError
from tunery.fast.packed_model import PackedModel
from tunery.fast.shared_input import forget_outputs
from tunery.jsonl import JsonObject
from tunery.lora.dropout import DropoutClock
from tunery.models.device import is_out_of_memory
from tunery.models.typed import numbers
from tunery.progress import Note, Progress
from tunery.training.advice import advise
from tunery.training.checkpoint import Checkpoints, TrainerState
from tunery.training.data_parallel import Workers, backward_part, split
from tunery.training.guard import (
    MicroBatchLimit,
    StopRequest,
    free_cached_memory,
    require_finite,
    require_finite_validation,
)
from tunery.training.objectives.base import Objective, StepStats
from tunery.training.objectives.sft import CROSS_ENTROPY
from tunery.training.schedule import learning_rate
from tunery.training.scoring import Scorer
from tunery.training.throughput import SpeedCheck
from tunery.training.worker_pool import WorkerLostError


@dataclass(frozen=True)
class Plan:
    """What the loop follows, everything "auto" settled.

    Attributes:
        config: the settings of `train:`.
        seed: of the run.
        objective: what is minimised; it says what a unit of a batch is, a row or a pair.
        total_steps, warmup_steps: optimizer steps.
        peak: the highest learning rate.
        eval_every, save_every: in steps; None for never.
        restore_best: go back to the best validated step at the end.
    """

    config: TrainConfig
    seed: int
    objective: Objective
    total_steps: int
    warmup_steps: int
    steps_per_epoch: int
    peak: float
    eval_every: int | None
    save_every: int | None
    restore_best: bool


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: the loss and the objective's metrics (means), the gradient's norm, and its sums."""

    loss: float
    metrics: dict[str, float]
    gradient_norm: float
    sums: StepStats


@dataclass(frozen=True)
class Gradient:
    """One batch's gradient, which stands in the parameters' `grad`, clipped; what is known of it may still be computing
    on a GPU.

    Attributes:
        weight: of the batch, by which the gradient was divided.
        norm: of the gradient before clipping.
    """

    sums: StepStats
    weight: float
    norm: Tensor

    def finite(self) -> Tensor:
        """Whether the loss and the norm are finite, on the device."""
        return torch.isfinite(torch.as_tensor(self.sums.loss, device=self.norm.device)) & torch.isfinite(self.norm)

    def read(self) -> StepResult:
        """Wait for the device, once."""
        loss, norm, *metrics = _read([self.sums.loss, self.norm, *self.sums.metrics.values()])
        means = {name: value / self.weight for name, value in zip(self.sums.metrics, metrics, strict=True)}
        return StepResult(loss / self.weight, means, norm, self.sums)


def _read(values: Sequence[Tensor | float]) -> list[float]:
    if not any(isinstance(value, Tensor) and value.is_cuda for value in values):
        return [float(value) for value in values]
    device = next(value.device for value in values if isinstance(value, Tensor) and value.is_cuda)
    return numbers(torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]))


def batch_gradient(
    model: PackedModel,
    parameters: Sequence[Tensor],
    rows: Sequence[Row],
    limit: MicroBatchLimit,
    clock: DropoutClock,
    key: tuple[int, int],
    max_norm: float | None,
    objective: Objective = CROSS_ENTROPY,
    workers: Workers | None = None,
) -> Gradient:
    """The gradient of one batch: its summed loss divided once by the batch's weight, whatever the micro-batches and
    workers.

    When memory runs out, the same batch is computed again in smaller parts (MicroBatchLimit).
    """
    weight = objective.weight(rows)
    context = objective.prepare_step(Scorer(model, None if workers is None else workers.pool), rows)
    count, cost = (1, 0.0) if workers is None else (workers.count, workers.pair_cost)
    while True:
        for parameter in parameters:
            parameter.grad = None
        parts = split(rows, count, objective.unit, cost, limit, key, weight, context)
        try:
            if workers is None or len(parts) == 1:
                sums = backward_part(model, clock, objective, parts[0])
            else:
                sums = workers.run(parts)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            limit.halve(error)
        forget_outputs()
        free_cached_memory()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm is not None else float("inf"))
    return Gradient(sums, weight, norm)


def train_step(
    model: PackedModel,
    parameters: Sequence[Tensor],
    rows: Sequence[Row],
    limit: MicroBatchLimit,
    clock: DropoutClock,
    key: tuple[int, int],
    max_norm: float | None,
    objective: Objective = CROSS_ENTROPY,
    workers: Workers | None = None,
) -> StepResult:
    """`batch_gradient`, waited for."""
    return batch_gradient(model, parameters, rows, limit, clock, key, max_norm, objective, workers).read()


def make_optimizer(adapter: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over the adapter's float32 tensors."""
    return torch.optim.AdamW(
        list(adapter.values()),
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over memory for each tensor
    )


@dataclass
class _Given:
    """A step on its way: number from 1, rows, learning rate, and when it began (seconds, perf_counter)."""

    number: int
    rows: Sequence[Row]
    gradient: Gradient
    rate: float
    started: float
    result: StepResult | None = None

    def require_finite(self) -> StepResult:
        """What came of it.

        Raises:
            DivergedError: the loss or the gradient's norm is not finite.
        """
        if self.result is None:
            result = self.gradient.read()
            places = list(dict.fromkeys(row.where for row in self.rows))
            require_finite(result.loss, result.gradient_norm, self.number, places)
            self.result = result
        return self.result


@dataclass
class Loop:
    """Everything a run needs; `run` takes it from `state.step` to the end.

    Attributes:
        history: lines logged so far (from metrics.jsonl when resumed); advice reads them.
        stopped: "finished" or "early stopping", after `run`.
        compiled: whether functions ran compiled (tunery.fast.compile); for the receipt.
        ahead: how many steps may be given to the device before an earlier one's numbers are read, 0 or 1. With 1 a GPU
            never waits for the host between steps; a step that is followed by anything but a step is waited for.
        speed_check: looks at the first steps.
        workers: compute parts of a step beside this process, on a CPU.
    """

    plan: Plan
    model: PackedModel
    adapter: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    clock: DropoutClock
    train: Sequence[Row]
    validation: Sequence[Row]
    limit: MicroBatchLimit
    checkpoints: Checkpoints
    state: TrainerState
    progress: Progress
    stop: StopRequest
    history: list[JsonObject]
    stopped: str = "finished"
    restored_step: int | None = None
    compiled: bool = False
    ahead: int = 0
    speed_check: SpeedCheck | None = None
    workers: Workers | None = None
    _bad: Tensor | None = None
    _settled: float = 0.0

    def run(self) -> None:
        """Train until the last step, an early stop, or a signal (StoppedError, after a checkpoint)."""
        with self.model.running():
            try:
                self._train()
            except WorkerLostError:
                self._save()  # the update was not made: this is where the step began
                raise
        best = self.state.best_step
        if self.plan.restore_best and best is not None and best != self.state.step:
            self.checkpoints.load(self.checkpoints.path(best), self.adapter, None)
            self.restored_step = best

    def _train(self) -> None:
        advised: set[str] = set()
        given: deque[_Given] = deque()
        while self.state.step < self.plan.total_steps:
            if self._out_of_patience():
                self.stopped = "early stopping"
                break
            number = self.state.step + len(given) + 1
            given.append(self._give(number))
            ahead = 0 if self.stop or self._eventful(number) else self.ahead
            while len(given) > ahead:
                self._settle(given.popleft())
            if given:
                continue
            done = self.state.step == self.plan.total_steps
            improved = self._validate() if self._due(self.plan.eval_every, done) else False
            if improved or done or self._out_of_patience() or self.stop or self._due(self.plan.save_every):
                self._save()
            if self._due(self.plan.eval_every, done):
                self._advise(advised)
            if self.stop and not done:
                raise StoppedError(
                    f"stopped after step {self.state.step} of {self.plan.total_steps}; the checkpoint is written",
                    "run the same command again to resume from there",
                    signal_number=self.stop.signal_number or 2,
                )

    def _eventful(self, number: int) -> bool:
        """Whether anything but the next step follows step `number`."""
        every = (self.plan.eval_every, self.plan.save_every)
        return number == self.plan.total_steps or any(n is not None and number % n == 0 for n in every)

    def _give(self, number: int) -> _Given:
        """Compute step `number` (from 1); with `ahead`, as far as giving it to the device."""
        plan, started = self.plan, time.perf_counter()
        rows = step_rows(self.train, plan.objective.unit, plan.seed, number - 1, plan.config.batch_size)
        halvings = self.limit.halvings
        gradient = batch_gradient(
            self.model,
            list(self.adapter.values()),
            rows,
            self.limit,
            self.clock,
            (plan.seed, number - 1),
            plan.config.max_grad_norm,
            plan.objective,
            self.workers,
        )
        rate = learning_rate(
            number,
            peak=plan.peak,
            total_steps=plan.total_steps,
            warmup_steps=plan.warmup_steps,
            scheduler=plan.config.scheduler,
        )
        given = _Given(number, rows, gradient, rate, started)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.ahead:
            self._skip_if_not_finite(gradient)
        else:
            given.require_finite()
        self.optimizer.step()
        if self.limit.halvings > halvings:
            text = f"memory ran out: the step was computed again, {self.limit.describe()}"
            self.progress.note(Note(text, level="warn", code="out_of_memory"))
        return given

    def _skip_if_not_finite(self, gradient: Gradient) -> None:
        """Have fused AdamW leave everything as it is where a number is not finite, in this step and in all that follow
        until the host finds out: nothing reaches the weights after a bad step."""
        bad = (~gradient.finite()).float()
        self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        self.optimizer.grad_scale, self.optimizer.found_inf = None, self._bad  # type: ignore[attr-defined]

    def _settle(self, given: _Given) -> None:
        """Read what came of a step, stop if it must not count, and count and log it."""
        result = given.require_finite()
        now = time.perf_counter()
        seconds, self._settled = now - max(given.started, self._settled), now
        self._count(result, seconds)
        if self.speed_check and (warning := self.speed_check.look(result.sums, seconds)):
            self.progress.note(warning)
        state = self.state
        if state.step % self.plan.config.logging_steps == 0 or state.step in (1, self.plan.total_steps):
            self._log_step(result, given.rate, seconds)

    def _count(self, result: StepResult, seconds: float) -> None:
        state = self.state
        state.step += 1
        state.seconds += seconds
        state.data_tokens += result.sums.data_tokens
        state.computed_tokens += result.sums.computed_tokens
        state.trained_tokens += result.sums.trained_tokens
        state.positions += result.sums.positions
        state.pairs += result.sums.pairs
        state.first_loss = result.loss if state.first_loss is None else state.first_loss
        state.last_loss = result.loss
        state.micro_rows, state.micro_tokens = self.limit.rows, self.limit.tokens
        state.halvings, state.recomputing = self.limit.halvings, self.limit.recomputing
        state.cpu_workers = 1 if self.workers is None else self.workers.count

    def _log_step(self, result: StepResult, rate: float, seconds: float) -> None:
        self._log(
            train_loss=result.loss,
            **result.metrics,
            learning_rate=rate,
            grad_norm=result.gradient_norm,
            data_tokens_per_second=result.sums.data_tokens / seconds,
            computed_tokens_per_second=result.sums.computed_tokens / seconds,
            seconds=seconds,
        )

    def _log(self, **values: float) -> None:
        step = self.state.step
        line = {"step": step, "epoch": round(step / self.plan.steps_per_epoch, 4), **values}
        self.history.append(line)
        self.progress.log(line)

    def _out_of_patience(self) -> bool:
        patience = self.plan.config.early_stopping_patience
        return patience is not None and self.state.bad_validations >= patience

    def _due(self, every: int | None, done: bool = False) -> bool:
        return every is not None and (done or self.state.step % every == 0)

    def _validate(self) -> bool:
        """Measure the validation loss; True if it is the best so far."""
        if not self.validation:
            return False
        started = time.perf_counter()
        pool = None if self.workers is None else self.workers.pool
        loss, metrics = self.plan.objective.measure(Scorer(self.model, pool, self.progress.note), self.validation)
        state = self.state
        require_finite_validation(loss, state.step)
        better = state.best_loss is None or loss < state.best_loss - self.plan.config.early_stopping_threshold
        state.bad_validations = 0 if better else state.bad_validations + 1
        state.valid_loss = loss
        if better:
            state.best_loss, state.best_step = loss, state.step
        named = {f"valid_{name}": value for name, value in metrics.items()}
        self._log(valid_loss=loss, **named, seconds=time.perf_counter() - started)
        return better and self.plan.restore_best

    def _save(self) -> None:
        self.checkpoints.save(self.adapter, self.optimizer, self.state)
        best = self.state.best_step if self.plan.restore_best else None
        self.checkpoints.prune(self.plan.config.save_limit, best)

    def _advise(self, given: set[str]) -> None:
        """Say what the curves show, each thing once."""
        for advice in advise(self.history):
            if advice.code not in given:
                self.progress.note(advice)
                given.add(advice.code)
