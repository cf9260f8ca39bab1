"""Forked processes that call functions beside this one, on the cores of one CPU.

A forked process sees the memory of its parent as it was at the fork, until either writes to it: the base is there once.
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

from tunery.data.batching import Row, deal
from tunery.errors import ResumableError, TuneryError
from tunery.fast.compile import compile_in_calling_thread
from tunery.fast.packed_model import PackedModel
from tunery.models.device import is_out_of_memory
from tunery.models.typed import text_config
from tunery.models.windows import attention_width
from tunery.training.flops import step_flops
from tunery.training.forking import anonymous_bytes, follow_parent, signals_held_back, thread_count

JOIN_SECONDS = 10.0

_RESUME = (
    "a checkpoint of the last step is written; run the same command again to resume from it, or compute in one process "
    "with --set train.cpu_workers=1"
)

SCALING = 0.8
"""n threads compute one batch n^SCALING times as fast as one: 1.69 to 1.81 times with two (docs/lab.md)."""

Function = Callable[[Any], Any]
"""Argument and result are pickled."""


class WorkerLostError(ResumableError):
    """A worker has ended without being told to."""


@dataclass(frozen=True)
class _Failure:
    """What went wrong in a worker: something that the user can act on, or words with a traceback."""

    words: str
    out_of_memory: bool
    error: TuneryError | None

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        out_of_memory = any(is_out_of_memory(each) for each in (error, error.__cause__) if each is not None)
        words = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        return cls(words, out_of_memory, error if isinstance(error, TuneryError) else None)

    def raised(self) -> Exception:
        """As an exception of this process."""
        if self.out_of_memory:
            return torch.OutOfMemoryError(self.words)
        return self.error or RuntimeError(self.words)


@dataclass
class _Worker:
    pid: int
    connection: Connection
    peak_bytes: int = 0
    exit_code: int | None = None
    asked: bool = False

    def join(self, until: float) -> int:
        """Wait for its end until then (time.monotonic()), and bring it about after; the exit code, negative for a
        signal."""
        while self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        return self.exit_code


class WorkerPool:
    """The processes beside this one, from `start` to `close`.

    Args:
        functions: what they can be asked for, by name.
        count: processes that compute, this one included.
        threads: of each.
    """

    def __init__(self, functions: Mapping[str, Function], count: int, threads: int) -> None:
        self.functions, self.threads = dict(functions), threads
        self._lost: WorkerLostError | None = None
        self._workers: list[_Worker] = []
        try:
            for _ in range(1, count):
                self._workers.append(self._fork())
        except OSError:
            self.close()
            raise

    @property
    def count(self) -> int:
        """Processes that compute, this one included."""
        return len(self._workers) + 1

    @property
    def pids(self) -> list[int]:
        """Of the other processes."""
        return [worker.pid for worker in self._workers]

    @property
    def peak_bytes(self) -> int:
        """The most memory of their own that the other processes have held, summed."""
        return sum(worker.peak_bytes for worker in self._workers)

    def call(self, name: str, arguments: Sequence[object]) -> list[Any]:
        """A function's result for each argument, at most `count`: the first computed by this process, each other one
        by a worker.

        A call that is interrupted, as by Ctrl-C, ends the workers: what they would still answer belongs to no call.

        Raises:
            RuntimeError: memory ran out in one of them, or what else a worker has raised.
            TuneryError: what a worker has raised for the user.
            WorkerLostError: one of them has ended, now or in an earlier call.
        """
        if self._lost:
            raise self._lost
        active = self._workers[: len(arguments) - 1]
        try:
            for worker, argument in zip(active, arguments[1:], strict=True):
                self._send(worker, (name, argument))
            try:
                with thread_count(self.threads):
                    results = [self.functions[name](arguments[0])]
            except Exception:
                for worker in active:
                    self._receive(worker)
                raise
            results += [self._receive(worker) for worker in active]
        except BaseException as error:
            if not isinstance(error, Exception) or any(worker.asked for worker in active):
                self._abandon()
            raise
        for result in results:
            if isinstance(result, _Failure):
                raise result.raised()
        return results

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()
        until = time.monotonic() + JOIN_SECONDS
        for worker in self._workers:
            worker.join(until)

    def _abandon(self) -> None:
        """End the processes at once; later calls say that they are lost."""
        for worker in self._workers:
            if worker.exit_code is None:
                os.kill(worker.pid, signal.SIGKILL)
            worker.join(time.monotonic())
        self._lost = self._lost or WorkerLostError("the worker processes of this run were ended", _RESUME)

    def _fork(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        with signals_held_back():
            pid = os.fork()
            if pid == 0:
                try:
                    follow_parent()
                    for connection in (ours, *(other.connection for other in self._workers)):
                        connection.close()  # held here too, it would not end with the main process
                    # A thread of its own, since the OpenMP threads of this one stayed with the parent.
                    loop = threading.Thread(target=self._work, args=(theirs,))
                    loop.start()
                    loop.join()
                finally:
                    os._exit(0)  # nothing of the parent's is flushed or cleaned up twice
        theirs.close()
        return _Worker(pid, ours)

    def _work(self, connection: Connection) -> None:
        """A worker's life: until the connection ends, which it does with the main process."""
        torch.set_num_threads(self.threads)
        compile_in_calling_thread()
        inherited = anonymous_bytes()
        while True:
            try:
                name, argument = connection.recv()
            except (EOFError, OSError):
                return
            try:
                reply = self.functions[name](argument)
            except BaseException as error:
                reply = _Failure.of(error)
            try:
                connection.send((reply, max(0, anonymous_bytes(peak=True) - inherited)))
            except (BrokenPipeError, OSError):
                return

    def _send(self, worker: _Worker, message: object) -> None:
        worker.asked = True
        try:
            worker.connection.send(message)
        except (BrokenPipeError, OSError):
            raise self._lose(worker) from None

    def _receive(self, worker: _Worker) -> Any:
        try:
            reply, worker.peak_bytes = worker.connection.recv()
        except (EOFError, OSError):
            raise self._lose(worker) from None
        worker.asked = False
        return reply

    def _lose(self, worker: _Worker) -> WorkerLostError:
        code = worker.join(time.monotonic() + JOIN_SECONDS)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        likely = "; the system ends processes when memory runs out" if code == -signal.SIGKILL else ""
        self._lost = WorkerLostError(f"a worker process of this run has ended ({how}{likely})", _RESUME)
        return self._lost


# --------------------------------------------------------------------------- how many


def pair_cost(model: PackedModel) -> float:
    """What a query and a key that see each other cost, summed over the layers, in computed tokens."""
    config = model.model.config
    layers = int(getattr(text_config(config), "num_hidden_layers", 0))
    token = step_flops(model.model, 1, 0, 0)
    return 12.0 * layers * attention_width(config) / token if token else 0.0


def wanted_workers(model: PackedModel, batches: Sequence[Sequence[Row]], unit: int, cores: int) -> int:
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


def can_fork(model: PackedModel) -> bool:
    """Linux, a CPU, and a base that is not quantised: bitsandbytes has threads of its own, which no fork keeps."""
    quantized = any(not parameter.is_floating_point() for parameter in model.model.parameters())
    return sys.platform == "linux" and model.device.type == "cpu" and not quantized
