"""What may go wrong in a step: numbers that are not finite, memory that runs out, a signal to stop."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import FrameType

import torch

from tunery.errors import DivergedError, ModelError
from tunery.progress import Note, Say
from tunery.text import plural

CALMER = (
    "start over with a lower rate (--resume never --set train.learning_rate=1e-4) or a longer warm-up "
    "(--set train.warmup=0.1); if it computed in bfloat16, try --set train.precision=float32"
)


def require_finite(loss: float, gradient_norm: float, step: int, rows: list[str]) -> None:
    """Stop before an update that would spoil the adapter.

    Args:
        step: number of the step about to be taken, from 1.
        rows: where the rows of this step come from.
    """
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {gradient_norm}"
    shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    raise DivergedError(f"step {step}: {what}. The update was not made. The rows of this step: {shown}", CALMER)


def require_finite_validation(loss: float, step: int) -> None:
    """Stop when the update of `step` has left a model whose validation loss is not a number; it is not saved."""
    if not math.isfinite(loss):
        raise DivergedError(f"after step {step} the validation loss is {loss}. The step was not saved", CALMER)


def out_of_memory_with_one_row(recomputing: bool = False, noun: str = "row") -> ModelError:
    """The error when there is nothing left to halve."""
    return ModelError(
        f"memory ran out with a single {noun}" + (", recomputing activations" if recomputing else ""),
        "shorten the rows (--set data.max_length=512), "
        + ("" if recomputing else "turn on --set train.gradient_checkpointing=true, ")
        + "or choose a smaller model",
    )


@dataclass
class MicroBatchLimit:
    """How much is computed at a time. Halved when memory runs out, and as the last resort activations are recomputed;
    the update stays the same.

    Attributes:
        rows: most rows (pairs, in preference training) at a time.
        tokens: most computed tokens at a time; None for no limit.
        halvings: how often memory ran out.
        recomputing: activations are recomputed.
        recompute: starts doing so; None where it is not allowed, not possible, or done already.
        noun: what a row is called.
    """

    rows: int
    tokens: int | None = None
    halvings: int = 0
    recomputing: bool = False
    recompute: Callable[[], None] | None = None
    noun: str = "row"

    @property
    def words(self) -> str:
        """The limit for a person: "8 rows"."""
        return plural(self.rows, self.noun)

    def halve(self, error: BaseException) -> None:
        """Make room after `error`.

        Raises:
            ModelError: one row at a time is already too much, whatever is recomputed.
        """
        if self.rows == 1:
            self._last_resort(error)
        self.rows = max(1, self.rows // 2)
        self.tokens = None if self.tokens is None else max(1, self.tokens // 2)
        self.halvings += 1

    def _last_resort(self, error: BaseException) -> None:
        if self.recompute is None:
            raise out_of_memory_with_one_row(self.recomputing, self.noun) from error
        self.recompute()
        self.recomputing, self.recompute = True, None

    def describe(self) -> str:
        """How much is computed at a time, in words."""
        return f"{self.words} at a time" + (", recomputing activations (slower)" if self.recomputing else "")


def free_cached_memory() -> None:
    """Give back what PyTorch's allocator keeps on a GPU, so that pieces of another size fit. What a failed step held
    must be gone first, and its exception with it: the traceback keeps its tensors alive."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class StopRequest:
    """Set by SIGINT or SIGTERM; the loop finishes its step, writes a checkpoint and stops.

    Attributes:
        say: told as soon as the first signal comes.
    """

    signal_number: int | None = None
    say: Say | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """A signal has come."""
        if self.signal_number is not None:  # asked twice: stop at once
            raise KeyboardInterrupt
        self.signal_number = number
        if self.say is not None:
            # Python refuses to print from a signal that came amid printing.
            with contextlib.suppress(RuntimeError):
                self.say(_STOPPING)


_STOPPING = Note(
    "stopping: the step in progress is finished and a checkpoint is written; a second Ctrl-C would stop at once, and "
    "lose what came after the last checkpoint",
    code="stopping",
)


@contextlib.contextmanager
def stop_signals(say: Say | None = None) -> Generator[StopRequest]:
    """Within this context the first SIGINT or SIGTERM is a request, and `say` is told; the second acts at once.

    In a thread other than the main one signals cannot be caught, and the request is never set.
    """
    request = StopRequest(say=say)
    caught = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, request.handle) for number in caught}
    except ValueError:
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
