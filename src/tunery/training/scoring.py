"""Rows scored without gradients, on every core: validation, labels, base vs. tuned."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tunery.data.batching import PackedBatch, Row, deal, micro_batches, pack
from tunery.fast.packed_model import PackedModel
from tunery.lora.attach import active_adapter, using
from tunery.models.device import is_out_of_memory
from tunery.models.typed import numbers
from tunery.progress import Note, Say
from tunery.training.guard import out_of_memory_with_one_row
from tunery.training.loss import BatchLoss, batch_loss
from tunery.training.worker_pool import Function, WorkerLostError, WorkerPool, can_fork, pair_cost, wanted_workers

BATCH_TOKENS = 4096
"""Computed tokens at a time, by all processes together: nothing is kept for a backward pass."""

WORKER_TOKENS = 1024
"""The same for one of many workers, at least: a shared prefix is computed once per batch."""

SAMPLED_ROWS = 512
"""Rows that decide how many workers score."""

_SCORE = "score"


@dataclass(frozen=True)
class Scores:
    """What a model says of rows.

    Attributes:
        log_probability: of each row's trained tokens, summed (nats). float64 [rows].
        loss: −log-probability of the trained tokens, times their weights, summed.
        correct: the weight of those that were the model's first choice.
        weight: of all trained tokens.
    """

    log_probability: np.ndarray
    loss: float
    correct: float
    weight: float

    @property
    def mean_loss(self) -> float:
        """Per trained token."""
        return self.loss / self.weight

    @property
    def accuracy(self) -> float:
        """The share of trained tokens that were the model's first choice."""
        return self.correct / self.weight


class Scorer:
    """Scores rows with the adapter that is active in this process.

    Args:
        model: the base with its adapters.
        pool: processes that compute beside this one; `scoring_functions` are among its functions.
        say: told when this process has to score alone.
    """

    def __init__(self, model: PackedModel, pool: WorkerPool | None = None, say: Say | None = None) -> None:
        self.model, self.pool, self._say = model, pool, say

    def __call__(self, rows: Sequence[Row]) -> Scores:
        """What the model says of the rows, in their order."""
        if self.pool is None:
            return score(self.model, rows)
        count = self.pool.count
        numbered = [replace(row, example=number) for number, row in enumerate(rows)]
        parts = deal(numbered, count, pair_cost=pair_cost(self.model))[0] if numbered else [numbered]
        tokens = max(BATCH_TOKENS // count, WORKER_TOKENS)
        adapter = active_adapter(self.model.model)
        try:
            found: list[Scores] = self.pool.call(_SCORE, [_Asked(part, adapter, tokens) for part in parts])
        except (RuntimeError, MemoryError, WorkerLostError) as error:
            if not isinstance(error, WorkerLostError) and not is_out_of_memory(error):
                raise
            self._note(error)
            return score(self.model, rows)
        log_probability = np.zeros(len(rows))
        for part, each in zip(parts, found, strict=True):
            log_probability[[row.example for row in part]] = each.log_probability
        loss, correct, weight = (sum(getattr(each, name) for each in found) for name in ("loss", "correct", "weight"))
        return Scores(log_probability, loss, correct, weight)

    def _note(self, error: Exception) -> None:
        """Say once why the workers are not used any more; a training loop finds out by itself at its next step."""
        if self._say is not None:
            why = error.message if isinstance(error, WorkerLostError) else "memory ran out in a worker process"
            self._say(Note(f"{why}: this process scores alone, which takes longer", level="warn", code="workers"))
        self._say, self.pool = None, None


@dataclass(frozen=True)
class _Asked:
    """A worker's rows, the adapter that is to be active, and how many tokens are computed at a time."""

    rows: Sequence[Row]
    adapter: str | None
    tokens: int


def scoring_functions(model: PackedModel) -> Mapping[str, Function]:
    """What the processes of a pool must be able to do for a Scorer."""
    return {_SCORE: partial(_answer, model)}


def _answer(model: PackedModel, asked: _Asked) -> Scores:
    with using(model.model, asked.adapter):
        return score(model, asked.rows, asked.tokens)


@contextlib.contextmanager
def scoring(
    model: PackedModel, rows: Sequence[Row], workers: int | str = "auto", say: Say | None = None
) -> Generator[Scorer]:
    """A scorer with as many workers as score such rows fastest, or with as many as are wanted (`train.cpu_workers`)."""
    count = workers if isinstance(workers, int) and can_fork(model) else 1
    if workers == "auto":
        count = wanted_workers(model, [rows[:SAMPLED_ROWS]] if rows else [], 1, torch.get_num_threads())
    if count == 1:
        yield Scorer(model)
        return
    threads = max(1, torch.get_num_threads() // count)
    try:
        pool = WorkerPool(scoring_functions(model), count, threads)
    except OSError:  # the system starts no further process
        yield Scorer(model)
        return
    try:
        yield Scorer(model, pool, say)
    finally:
        pool.close()


@torch.no_grad()
def score(model: PackedModel, rows: Sequence[Row], tokens: int = BATCH_TOKENS) -> Scores:
    """What a model says of rows, computed by this process; one chunk of logits exists at a time."""
    weight = 0.0
    found: list[tuple[np.ndarray, BatchLoss]] = []
    numbered = [replace(row, example=number) for number, row in enumerate(rows)]
    for part, batch, loss in _losses(model, numbered, tokens):
        found.append((np.asarray([row.example for row in part])[batch.owners], loss))
        weight += float(batch.weights.sum())
    # read only now: each reading waits for the device
    log_probability = np.zeros(len(rows))
    for where, loss in found:
        np.add.at(log_probability, where, -loss.each.cpu().double().numpy())
    total, correct = (_sum([getattr(loss, name) for _, loss in found]) for name in ("total", "correct"))
    return Scores(log_probability, total, correct, weight)


def _sum(values: Sequence[Tensor]) -> float:
    return sum(numbers(torch.stack(list(values)))) if values else 0.0


def _losses(model: PackedModel, rows: Sequence[Row], tokens: int) -> Iterator[tuple[list[Row], PackedBatch, BatchLoss]]:
    """Losses of all rows; where memory runs out, a batch is halved and tried again."""
    waiting = list(micro_batches(rows, len(rows) if model.flattened else 1, tokens))[::-1]
    while waiting:
        part = waiting.pop()
        batch = pack(part)
        try:
            yield part, batch, batch_loss(model, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise out_of_memory_with_one_row() from error
            waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
