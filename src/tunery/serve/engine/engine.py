"""The engine: a thread that computes one step after another for all rows that are being answered.

Between two steps rows join and leave. A step gives each decoding row its next token and goes on with prompts, a bounded
number of tokens at a time so that the decoding rows do not wait long.

transformers 5.23 brings continuous batching of its own (transformers.generation.continuous_batching). It was looked at
first, and does not carry this: temperature, top_k and top_p are the only things that may differ between rows (one
generation config and one list of processors for all: no penalties, bias, log-probabilities or grammars a row); nothing
tells a module which tokens are whose, so rows cannot have different adapters; and its paged attention and memory are
sized for a GPU. None of this can be given to it through a public extension point.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tunery.inference.prefix import BLOCK
from tunery.inference.runner import Runner, RunnerPart
from tunery.models.device import is_out_of_memory
from tunery.models.load import Base
from tunery.serve.api_errors import ApiError, Busy, from_exception, server_error
from tunery.serve.engine.backend import Item, TokenDelta
from tunery.serve.engine.batch import Batch, BatchLimits
from tunery.serve.engine.running import Asked, RunningRequest
from tunery.serve.engine.sampling_params import choose, log_probabilities
from tunery.training.guard import free_cached_memory

LOG = logging.getLogger(__name__)


class Engine:
    """Answers rows.

    `submit`, `cancel`, `forget` and `health` may be called from any thread.

    Args:
        base: becomes the engine's; its model is changed for good.

    Raises:
        ModelError: the model cannot be computed this way.
    """

    def __init__(self, base: Base, limits: BatchLimits | None = None):
        self._wake = threading.Event()
        self.limits = limits or BatchLimits()
        self.runner = Runner(base, self.limits.adapters, self._wake.set)
        self.batch = Batch(self.runner, self.limits)
        self._inbox: deque[Asked | str] = deque()
        self._lock = threading.Lock()
        self._unread = 0  # rows in the inbox
        self._closing = False
        self._thread: threading.Thread | None = None
        self._row_seconds = 5.0  # from the queue to the last token, lately
        self._counts = {"steps": 0, "computed_tokens": 0, "answered_tokens": 0, "answers": 0}

    # ----------------------------------------------------------------- from other threads

    def start(self) -> None:
        """Begin to answer.

        What is in memory by now is there to stay: Python's collector of cycles need not look through it again and
        again, which took a tenth of the time (docs/lab.md).
        """
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self._loop, name="tunery-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is being answered fails."""
        with self._lock:
            self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self.runner.bank.close()

    def submit(self, asked: Asked) -> None:
        """Answer a request.

        Raises:
            Busy: the queue is full.
            ApiError: 503, the server is shutting down.
        """
        asked.open = len(asked.rows)
        with self._lock:
            if self._closing:
                raise _shutting_down()
            queued = self._unread + len(self.batch.waiting)
            if queued and queued + asked.open > self.limits.waiting:
                raise Busy(self._row_seconds * (queued + 1) / self.limits.rows)
            self._unread += asked.open
            self._inbox.append(asked)
        self._wake.set()

    def cancel(self, asked: Asked) -> None:
        """Stop answering a request, from the next step on."""
        asked.cancelled = True
        self._wake.set()

    def forget(self, key: str) -> None:
        """Drop what is kept of an adapter."""
        self._inbox.append(key)
        self._wake.set()

    def health(self) -> dict[str, object]:
        """Facts for a person who looks."""
        batch, bank = self.batch, self.runner.bank
        return {
            "rows": len(batch.active),
            "rows_limit": self.limits.rows,
            "waiting": self._unread + len(batch.waiting),
            "waiting_limit": self.limits.waiting,
            "adapters": bank.loaded,
            "adapters_limit": bank.capacity,
            "adapter_bytes": bank.bytes(),
            "cache_bytes": batch.cache.bytes(),
            "cache_limit_bytes": batch.cache.budget,
            "cached_prefix_tokens": len(batch.prefix) * BLOCK,
            "context": batch.context,
            **self._counts,
        }

    # ----------------------------------------------------------------- the loop

    def _loop(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                busy = self._turn()
            except Exception as error:  # a bug of ours: whoever waits is told, and the loop lives on
                LOG.exception("a turn of the engine failed")
                self._fail_all(error)
                busy = True
            if not busy:
                self._wake.wait()
        self._read_inbox()
        self._fail_all(_shutting_down())

    def _turn(self) -> bool:
        """One step, with what comes before it; false if there is nothing to do but to wait."""
        self._read_inbox()
        for row in [row for row in self.batch.active if row.asked.cancelled]:
            self.batch.leave(row)
        for row, error in self.batch.admit():
            self._fail(row, error)
        parts = self.batch.plan()
        if parts:
            self._compute(parts)
            self._counts["steps"] += 1
        return bool(parts) or self.batch.put_back

    def _read_inbox(self) -> None:
        while self._inbox:
            entry = self._inbox.popleft()
            if isinstance(entry, str):
                self.batch.forget(entry)
                continue
            for row in entry.rows:
                row.since = time.monotonic()
                if not self._send(row, row.begin()):
                    self.batch.waiting.append(row)
            with self._lock:
                self._unread -= len(entry.rows)

    def _fail_all(self, error: Exception) -> None:
        for row in [*self.batch.active, *self.batch.waiting]:
            self._fail(row, error)
        self.batch.clear()

    # ----------------------------------------------------------------- a step

    def _compute(self, parts: Sequence[RunnerPart]) -> None:
        """Compute a step. If that fails its halves are tried, so that only those rows fail that cause it."""
        try:
            kept, logits = self.runner.run(parts)
        except Exception as error:
            self.runner.forget_step()
            if len(parts) == 1:
                LOG.exception("a row failed")
                self._fail(parts[0].row, error)
                self.batch.leave(parts[0].row, sound=False)
                return
        else:
            for part in parts:
                part.row.computed += len(part.tokens)
                self._counts["computed_tokens"] += len(part.tokens)
                self.batch.keep_blocks(part.row)
            self._go_on(kept, logits)
            return
        # Out here the exception is gone; its traceback would have kept the tensors of the failed step alive.
        free_cached_memory()
        self._compute(parts[: len(parts) // 2])
        self._compute(parts[len(parts) // 2 :])

    def _go_on(self, kept: Sequence[RunnerPart], logits: Tensor) -> None:
        """Score prompts, choose tokens, and send what can be sent."""
        ends = np.cumsum([part.keep for part in kept]).tolist()
        ready: list[tuple[RunningRequest, int]] = []
        for part, end in zip(kept, ends, strict=True):
            ended = False
            if part.row.echo is not None and part.row.echo.scored and part.start < len(part.row.prompt):
                ended = self._score(part, logits[end - part.keep : end])
            if not ended and not part.row.pending:
                ready.append((part.row, end - 1))
        if not ready:
            return
        last = [end for _, end in ready]
        chosen = logits if len(last) == len(logits) else logits[last]
        for (row, _), choice in zip(ready, choose(chosen, [row.sampler for row, _ in ready]), strict=True):
            try:
                if isinstance(choice, Exception):
                    raise choice
                self._counts["answered_tokens"] += 1
                ended = self._send(row, row.advance(choice))
            except Exception as error:
                LOG.warning("a row failed: %s", error)
                self._fail(row, error)
                self.batch.leave(row, sound=not isinstance(error, FloatingPointError))
                continue
            if ended:
                self.batch.leave(row)

    def _score(self, part: RunnerPart, logits: Tensor) -> bool:
        """The log-probabilities of a stretch of a prompt; whether the row ends with it."""
        row = part.row
        targets = row.prompt[part.start + 1 : part.start + part.keep + 1]
        shares = torch.log_softmax(logits[: len(targets)], dim=-1)
        top = row.sampler.sampling.top_logprobs or 0
        ended = self._send(row, row.score(log_probabilities(shares, targets, [top] * len(targets))))
        if ended:
            self.batch.leave(row)
        return ended

    # ----------------------------------------------------------------- answering

    def _send(self, row: RunningRequest, deltas: Sequence[TokenDelta]) -> bool:
        """Send a row's deltas; whether the row ends with them. The request's usage follows its last row."""
        asked, items = row.asked, list[Item | Exception](deltas)
        ended = bool(deltas) and deltas[-1].finish_reason is not None
        if ended:
            asked.open -= 1
            self._counts["answers"] += 1
            self._row_seconds += 0.1 * (time.monotonic() - row.since - self._row_seconds)
            if not asked.open:
                items.append(asked.usage())
        self._deliver(asked, items)
        return ended

    def _fail(self, row: RunningRequest, error: Exception) -> None:
        """End a row's request, with all its rows, by an error."""
        self._deliver(row.asked, [_as_answer(error)])
        row.asked.cancelled = True

    def _deliver(self, asked: Asked, items: list[Item | Exception]) -> None:
        if not items or asked.cancelled:
            return
        try:
            asked.deliver(items)
        except RuntimeError:  # the event loop that waited for it has closed
            asked.cancelled = True


def _as_answer(error: Exception) -> ApiError:
    """What the client is told."""
    if isinstance(error, FloatingPointError):
        return ApiError(500, f"This request cannot be answered: {error}.", type="server_error")
    if is_out_of_memory(error):
        return ApiError(503, "The server's memory ran out. Send less at a time, or try again.", type="server_error")
    return from_exception(error) or server_error()


def _shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", type="server_error")
