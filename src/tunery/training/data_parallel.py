"""Data parallelism over the cores of one CPU: forked workers compute the gradient of some rows of each step.

Each worker has its own cores and computes its rows alone, so small operations of different workers run at the same
time, no thread waits for another inside an operation, and a thread that a neighbour's program has preempted holds up
nothing but its own rows. The base is shared: a forked process sees the memory of its parent until either writes to it.
The adapter lies in memory that all of them see, so an optimizer step of the main process is one of theirs. Gradients
are summed in the order of the workers: the update is that of one process, up to floating-point order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunery.data.batching import Row, deal, micro_batches
from tunery.fast.fused_lora import one_step
from tunery.fast.packed_model import PackedModel
from tunery.lora.dropout import DropoutClock
from tunery.training.forking import shared_like
from tunery.training.guard import MicroBatchLimit
from tunery.training.objectives.base import Objective, StepStats
from tunery.training.worker_pool import Function, WorkerPool, pair_cost

_GRADIENT = "gradient"

MICRO_BATCHES = 1 << 20
"""Worker w numbers its micro-batches from w · MICRO_BATCHES, so that each draws dropout masks of its own."""


@dataclass(frozen=True)
class StepPart:
    """What one worker computes of a step.

    Attributes:
        max_units, max_tokens: at a time (tunery.data.batching.micro_batches).
        key: (seed, step); with the number of the micro-batch, which counts from `first`, it decides dropout masks.
        weight: of the whole step.
        context: of the whole step (Objective.prepare_step).
    """

    rows: Sequence[Row]
    max_units: int
    max_tokens: int | None
    key: tuple[int, int]
    first: int
    weight: float
    context: object = None


Backward = Callable[[StepPart], StepStats]
"""Adds a part's gradient to `.grad` of the adapter's tensors, and returns its sums."""


def split(
    rows: Sequence[Row],
    workers: int,
    unit: int,
    cost: float,
    limit: MicroBatchLimit,
    key: tuple[int, int],
    weight: float,
    context: object = None,
) -> list[StepPart]:
    """A step's rows as parts for at most so many workers, which together keep to the limit of what is computed at a
    time."""
    workers = min(workers, limit.rows)
    dealt = [list(rows)] if workers == 1 else deal(rows, workers, unit, cost)[0]
    units = max(1, limit.rows // len(dealt))
    tokens = None if limit.tokens is None else max(1, limit.tokens // len(dealt))
    return [
        StepPart(part, units, tokens, key, number * MICRO_BATCHES, weight, context) for number, part in enumerate(dealt)
    ]


def backward_part(model: PackedModel, clock: DropoutClock, objective: Objective, part: StepPart) -> StepStats:
    """Add the gradient of some rows of a step to `.grad`, a micro-batch at a time."""
    sums = StepStats()
    clock.enabled = True
    try:
        with model.running(), one_step():
            units = part.max_units if model.flattened else 1
            for number, rows in enumerate(micro_batches(part.rows, units, part.max_tokens, objective.unit), part.first):
                clock.set(*part.key, number)
                sums += objective.backward(model, rows, part.weight, part.context)
    finally:
        clock.enabled = False
    return sums


class Workers:
    """A training loop's worker processes, from `start` to `close`.

    Args:
        parameters: the adapter's tensors. They move into shared memory, with their values.
        backward: computes a gradient, here as in every worker.
        count: processes that compute, this one included.
        threads: of each.
        pair_cost: see `pair_cost`.
        functions: what else the processes can be asked for (WorkerPool).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        backward: Backward,
        count: int,
        threads: int,
        pair_cost: float = 0.0,
        functions: Mapping[str, Function] | None = None,
    ) -> None:
        self.parameters, self.backward, self.pair_cost = list(parameters), backward, pair_cost
        for parameter, shared in zip(self.parameters, shared_like(self.parameters), strict=True):
            parameter.data = shared.copy_(parameter.data)
        self._gradients = [shared_like(self.parameters) for _ in range(1, count)]
        self.pool = WorkerPool({_GRADIENT: self._gradient, **(functions or {})}, count, threads)

    @property
    def count(self) -> int:
        """Processes that compute, this one included."""
        return self.pool.count

    def run(self, parts: Sequence[StepPart]) -> StepStats:
        """The gradient of a step, whose first part this process computes, and each other one a worker.

        Raises:
            RuntimeError, WorkerLostError: see WorkerPool.call.
        """
        sums = StepStats()
        for each in self.pool.call(_GRADIENT, list(enumerate(parts))):
            sums += each
        for gradients in self._gradients[: len(parts) - 1]:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad.add_(gradient)
        return sums

    def close(self) -> None:
        """End the processes."""
        self.pool.close()

    def _gradient(self, asked: tuple[int, StepPart]) -> StepStats:
        """Of one process's part: in `.grad` of the main process, number 0, and for a worker in shared memory."""
        number, part = asked
        if number == 0:
            return self.backward(part)
        try:
            for parameter in self.parameters:
                parameter.grad = None
            sums = self.backward(part)
            for parameter, gradient in zip(self.parameters, self._gradients[number - 1], strict=True):
                gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
        finally:
            for parameter in self.parameters:
                parameter.grad = None
        sums.loss = float(sums.loss)
        sums.metrics = {name: float(value) for name, value in sums.metrics.items()}
        return sums


def start_workers(
    model: PackedModel,
    parameters: Sequence[Tensor],
    clock: DropoutClock,
    objective: Objective,
    count: int,
    functions: Mapping[str, Function] | None = None,
) -> Workers | None:
    """`count` workers for a training loop, this process included; None for 1. The first fork must come after the
    model, its adapter and its objective are ready: workers see them as they are then."""
    if count == 1:
        return None
    threads = max(1, torch.get_num_threads() // count)
    return Workers(
        parameters,
        lambda part: backward_part(model, clock, objective, part),
        count,
        threads,
        pair_cost(model),
        functions,
    )
