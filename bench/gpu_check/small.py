"""A 135M model on batches of short rows, where launches bound a step: host time, and what a CUDA graph would save."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu_check.check import Check, milliseconds
from bench.gpu_check.trainer import measure_host, measure_steps, random_llama, random_rows, trainer_of
from bench.peers.with_tunery import Trainer
from tunery.data.batching import PackedBatch, Row, pack
from tunery.fast.packed_model import PackedModel
from tunery.fast.trial import relative_difference
from tunery.training.loss import batch_loss

ROWS, LENGTH, SHARED, TRAINED = 16, 80, 47, 2
"""Of the film reviews of examples/sentiment: rows of a batch, tokens of a row, of which every row shares the first and
the last are trained."""

TRIALS = 5
"""Runs before a graph is captured, so that all kernels are there and all metadata lies on the device."""


def small(check: Check) -> None:
    """The optimizer step, the host's time, and forward and backward pass eager against replayed from a CUDA graph."""
    started = time.perf_counter()
    trainer = trainer_of(random_llama(check, check.shape("135m")))
    check.say("build", shape="135m", seconds=check.since(started))
    measure = functools.partial(measure_steps, check, "step, 135m", trainer)
    check.attempt("step, 135m", lambda: measure(lambda step: short_rows(check, step), check.steps))
    check.attempt("host", lambda: measure_host(check, trainer, short_rows(check, 0), "135m"))
    check.attempt("graph", lambda: _graph(check, trainer))


def short_rows(check: Check, seed: int) -> list[Row]:
    """A batch of ROWS."""
    return random_rows(check, ROWS, SHARED, seed, LENGTH, TRAINED)


class Repeated(PackedModel):
    """A model that computes one batch again and again: what that batch needs is brought to the device once. A graph
    cannot be captured while the host copies."""

    @functools.cached_property
    def _kept(self) -> dict[int, tuple[object, Any]]:
        return {}

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if id(key) not in self._kept:
            self._kept[id(key)] = (key, make())  # the key is held, so that no other object gets its id
        return self._kept[id(key)][1]

    def tensor(self, array: np.ndarray) -> Tensor:
        """A NumPy array on the model's device."""
        return self._once(array, lambda: super(Repeated, self).tensor(array))

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        return self._once(batch, lambda: super(Repeated, self)._inputs(batch))


def _graph(check: Check, trainer: Trainer) -> None:
    """Forward and backward pass of one batch. On a CPU there are no graphs: only the eager time is told."""
    batch, parameters = pack(short_rows(check, 0)), list(trainer.adapter.values())
    model = Repeated(**{field.name: getattr(trainer.model, field.name) for field in fields(trainer.model)})

    def work() -> None:
        for parameter in parameters:
            parameter.grad = None
        with model.running():
            (batch_loss(model, batch).total / 1e4).backward()

    for _ in range(TRIALS):
        work()
    eager = _wall(check, work)
    facts: dict[str, object] = {"tokens": len(batch.ids), "eager_ms": milliseconds(eager, 3)}
    if not torch.cuda.is_available() or check.tiny:
        check.say("graph", **facts)
        return
    wanted = [p.grad.clone() for p in parameters if p.grad is not None]
    started = time.perf_counter()
    replay = _captured(work)
    facts["capture_s"] = check.since(started)
    facts["replay_ms"] = milliseconds(_wall(check, replay), 3)
    got = [p.grad for p in parameters if p.grad is not None]
    facts["gradient_differs"] = max(relative_difference(a, b, floor=1e-12) for a, b in zip(got, wanted, strict=True))
    check.say("graph", **facts)


def _wall(check: Check, work: Callable[[], object], times: int = 20) -> float:
    """Mean seconds of several runs back to back, as a training loop makes them: launches count."""
    check.wait()
    times = 2 if check.tiny else times
    started = time.perf_counter()
    for _ in range(times):
        work()
    check.wait()
    return (time.perf_counter() - started) / times


def _captured(work: Callable[[], None]) -> Callable[[], None]:
    """Record the work as a CUDA graph (docs.pytorch.org, "CUDA graphs": first run on a side stream)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
