"""Data parallelism over the cores of one CPU: forked workers compute the gradient of some rows of each step.

Each worker has its own cores and computes its rows alone, so small operations of different workers run at the same
time, no thread waits for another inside an operation, and a thread that a neighbour's program has preempted holds up
nothing but its own rows. The base is shared: a forked process sees the memory of its parent until either writes to it.
The adapter lies in memory that all of them see, so an optimizer step of the main process is one of theirs. Gradients
are summed in the order of the workers: the update is that of one process, up to floating-point order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from tunery.data.batching import Row, deal, micro_batches
from tunery.errors import ResumableError
from tunery.lora.fused import one_step
from tunery.lora.layer import DropoutClock
from tunery.models.flat import FlatModel
from tunery.models.flops import attention_width, step_flops
from tunery.training.forking import anonymous_bytes, follow_parent, shared_like, signals_held_back, thread_count
from tunery.training.guard import MicroBatchLimit, is_out_of_memory
from tunery.training.objective import Objective, Sums

SCALING = 0.8
"""n threads compute one batch n^SCALING times as fast as one: 1.69 to 1.81 times with two (docs/lab.md)."""

JOIN_SECONDS = 10.0

MICRO_BATCHES = 1 << 20
"""Worker w numbers its micro-batches from w · MICRO_BATCHES, so that each draws dropout masks of its own."""


@dataclass(frozen=True)
class Part:
    """What one worker computes of a step.

    Attributes:
        max_units, max_tokens: at a time (tunery.data.batching.micro_batches).
        key: (seed, step); with the number of the micro-batch, which counts from `first`, it decides dropout masks.
        weight: of the whole step.
    """

    rows: Sequence[Row]
    max_units: int
    max_tokens: int | None
    key: tuple[int, int]
    first: int
    weight: float


Backward = Callable[[Part], Sums]
"""Adds a part's gradient to `.grad` of the adapter's tensors, and returns its sums."""


def pair_cost(model: FlatModel) -> float:
    """What a query and a key that see each other cost, summed over the layers, in computed tokens."""
    config = model.model.config
    layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0))
    token = step_flops(model.model, 1, 0, 0)
    return 12.0 * layers * attention_width(config) / token if token else 0.0


def wanted_workers(model: FlatModel, batches: Sequence[Sequence[Row]], unit: int, cores: int) -> int:
    """How many workers compute these batches fastest: 1 where this process alone does, on all cores.

    A worker has cores / workers threads. More workers compute a prefix that all rows share more often, and rows of
    different length leave some of them waiting.
    """
    if not can_fork(model) or not batches:
        return 1
    cost, best, fastest = pair_cost(model), 1, 0.0
    for workers in (number for number in range(1, cores + 1) if cores % number == 0):
        slowest = sum(deal(rows, workers, unit, cost)[1] for rows in batches)
        speed = (cores / workers) ** SCALING / slowest
        if speed > fastest:
            best, fastest = workers, speed
    return best


def can_fork(model: FlatModel) -> bool:
    """Linux, a CPU, and a base that is not quantised: bitsandbytes has threads of its own, which no fork keeps."""
    quantized = any(not parameter.is_floating_point() for parameter in model.model.parameters())
    return sys.platform == "linux" and model.device.type == "cpu" and not quantized


def split(
    rows: Sequence[Row],
    workers: int,
    unit: int,
    cost: float,
    limit: MicroBatchLimit,
    key: tuple[int, int],
    weight: float,
) -> list[Part]:
    """A step's rows as parts for at most so many workers, which together keep to the limit of what is computed at a
    time."""
    workers = min(workers, limit.rows)
    dealt = [list(rows)] if workers == 1 else deal(rows, workers, unit, cost)[0]
    units = max(1, limit.rows // len(dealt))
    tokens = None if limit.tokens is None else max(1, limit.tokens // len(dealt))
    return [Part(part, units, tokens, key, number * MICRO_BATCHES, weight) for number, part in enumerate(dealt)]


def backward_part(model: FlatModel, clock: DropoutClock, objective: Objective, part: Part) -> Sums:
    """Add the gradient of some rows of a step to `.grad`, a micro-batch at a time."""
    sums = Sums()
    clock.enabled = True
    try:
        with model.running(), one_step():
            units = part.max_units if model.flattened else 1
            for number, rows in enumerate(micro_batches(part.rows, units, part.max_tokens, objective.unit), part.first):
                clock.set(*part.key, number)
                sums += objective.backward(model, rows, part.weight)
    finally:
        clock.enabled = False
    return sums


class WorkerLostError(ResumableError):
    """A worker has ended without being told to."""


@dataclass
class _Worker:
    pid: int
    connection: Connection
    gradients: Sequence[Tensor]
    peak_bytes: int = 0
    exit_code: int | None = None

    def join(self) -> int:
        """Wait for its end, and bring it about if it takes long; the exit code, negative for a signal."""
        until = time.monotonic() + JOIN_SECONDS
        while self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        return self.exit_code


class Workers:
    """The processes beside this one, from `start` to `close`.

    Args:
        parameters: the adapter's tensors. They move into shared memory, with their values.
        backward: computes a gradient, here as in every worker.
        count: processes that compute, this one included.
        threads: of each.
        pair_cost: see `pair_cost`.
        commands: what a worker does when it is told the name (`tell`).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        backward: Backward,
        count: int,
        threads: int,
        pair_cost: float = 0.0,
        commands: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        self.parameters, self.backward, self.threads = list(parameters), backward, threads
        self.pair_cost, self.commands = pair_cost, dict(commands or {})
        for parameter, shared in zip(self.parameters, shared_like(self.parameters), strict=True):
            parameter.data = shared.copy_(parameter.data)
        self._workers: list[_Worker] = []
        for _ in range(1, count):
            self._workers.append(self._fork())

    @property
    def count(self) -> int:
        """Processes that compute, this one included."""
        return len(self._workers) + 1

    @property
    def peak_bytes(self) -> int:
        """The most memory of their own that the other processes have held, summed."""
        return sum(worker.peak_bytes for worker in self._workers)

    def run(self, parts: Sequence[Part]) -> Sums:
        """The gradient of a step, whose first part this process computes, and each other one a worker.

        Raises:
            RuntimeError: memory ran out in one of them, or what else a worker has raised.
            WorkerLostError: one of them has ended.
        """
        active = self._workers[: len(parts) - 1]
        for worker, part in zip(active, parts[1:], strict=True):
            self._send(worker, part)
        try:
            with thread_count(self.threads):
                sums = self.backward(parts[0])
        finally:
            replies = [self._receive(worker) for worker in active]
        for reply in replies:
            if isinstance(reply, Failure):
                raise torch.OutOfMemoryError(reply.words) if reply.out_of_memory else RuntimeError(reply.words)
            sums += reply
        for worker in active:
            for parameter, gradient in zip(self.parameters, worker.gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad.add_(gradient)
        return sums

    def tell(self, command: str) -> None:
        """Have every worker do what `commands` says under this name."""
        for worker in self._workers:
            self._send(worker, command)
        for worker in self._workers:
            if isinstance(reply := self._receive(worker), Failure):
                raise RuntimeError(reply.words)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.join()

    def _fork(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        gradients = shared_like(self.parameters)
        with signals_held_back():
            pid = os.fork()
            if pid == 0:
                try:
                    follow_parent()
                    for connection in (ours, *(other.connection for other in self._workers)):
                        connection.close()  # held here too, it would not end with the main process
                    # A thread of its own, since the OpenMP threads of this one stayed with the parent.
                    loop = threading.Thread(target=self._work, args=(theirs, gradients))
                    loop.start()
                    loop.join()
                finally:
                    os._exit(0)  # nothing of the parent's is flushed or cleaned up twice
        theirs.close()
        return _Worker(pid, ours, gradients)

    def _work(self, connection: Connection, gradients: Sequence[Tensor]) -> None:
        """A worker's life: until the connection ends, which it does with the main process."""
        torch.set_num_threads(self.threads)
        inherited = anonymous_bytes()
        while True:
            try:
                asked = connection.recv()
            except (EOFError, OSError):
                return
            try:
                reply = self._answer(asked, gradients)
            except BaseException as error:
                reply = Failure(f"{type(error).__name__}: {error}\n{traceback.format_exc()}", is_out_of_memory(error))
                for parameter in self.parameters:
                    parameter.grad = None
            try:
                connection.send((reply, max(0, anonymous_bytes(peak=True) - inherited)))
            except (BrokenPipeError, OSError):
                return

    def _answer(self, asked: Part | str, gradients: Sequence[Tensor]) -> Sums | None:
        if isinstance(asked, str):
            return self.commands[asked]()
        for parameter in self.parameters:
            parameter.grad = None
        sums = self.backward(asked)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
            parameter.grad = None
        sums.loss = float(sums.loss)
        sums.metrics = {name: float(value) for name, value in sums.metrics.items()}
        return sums

    def _send(self, worker: _Worker, message: Any) -> None:
        try:
            worker.connection.send(message)
        except (BrokenPipeError, OSError):
            raise self._lost(worker) from None

    def _receive(self, worker: _Worker) -> Any:
        try:
            reply, worker.peak_bytes = worker.connection.recv()
        except (EOFError, OSError):
            raise self._lost(worker) from None
        return reply

    def _lost(self, worker: _Worker) -> WorkerLostError:
        code = worker.join()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        likely = "; the system ends processes when memory runs out" if code == -signal.SIGKILL else ""
        return WorkerLostError(
            f"a worker process of this run has ended ({how}{likely})",
            "a checkpoint of the last step is written; run the same command again to resume from it, or compute in one "
            "process with --set train.cpu_workers=1",
        )


@dataclass(frozen=True)
class Failure:
    """What went wrong in a worker."""

    words: str
    out_of_memory: bool


def start_workers(
    model: FlatModel,
    parameters: Sequence[Tensor],
    clock: DropoutClock,
    objective: Objective,
    count: int,
    commands: Mapping[str, Callable[[], None]] | None = None,
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
        commands,
    )
