"""A learning-rate range test (Smith 2015, arXiv:1506.01186, §3.3): raise the rate step by step on the real data and
look where the loss falls fastest and where it blows up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tunery.config import Task
from tunery.data.batching import step_rows
from tunery.data.prepare import Prepared
from tunery.errors import DivergedError
from tunery.fast.packed_model import optimize_model
from tunery.lora.attach import adapter_state
from tunery.models.device import available_memory
from tunery.models.load import Base
from tunery.training.decoder_layers import running_layers
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import make_optimizer, train_step
from tunery.training.plan import make_objective
from tunery.training.sizing import size_up
from tunery.training.start import attach_adapter

LOWEST, HIGHEST = 1e-5, 3e-2
SMOOTHING = 0.8
RISEN = 0.02
"""A curve that does not end this much above its lowest point has not risen."""
BLOWN_UP = 2.0
"""The test ends when the smoothed loss is this many times its best."""


@dataclass(frozen=True)
class RangeTest:
    """The curve of a range test.

    Attributes:
        rates, losses: one of each a step; losses are smoothed (exponential mean, bias-corrected).
        suggestion: the rate to train with.
        reason: in words.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float
    reason: str

    def draw(self, width: int = 60, height: int = 12) -> str:
        """The curve in characters: loss upwards, rate to the right (logarithmic)."""
        low, high = min(self.losses), max(self.losses)
        left, right = math.log10(self.rates[0]), math.log10(self.rates[-1])
        grid = [[" "] * width for _ in range(height)]

        def column(rate: float) -> int:
            return round((math.log10(rate) - left) / max(right - left, 1e-9) * (width - 1))

        for line in grid:
            line[column(self.suggestion)] = "┊"
        for rate, loss in zip(self.rates, self.losses, strict=True):
            grid[round((high - loss) / max(high - low, 1e-9) * (height - 1))][column(rate)] = "●"
        lines = [
            f"{high:8.3f} ┤" if i == 0 else f"{low:8.3f} ┤" if i == height - 1 else "         │" for i in range(height)
        ]
        body = [edge + "".join(line) for edge, line in zip(lines, grid, strict=True)]
        foot = f"          {self.rates[0]:<{width - 8}.0e}{self.rates[-1]:>8.0e}"
        return "\n".join([*body, "         └" + "─" * width, foot])


def range_test(task: Task, prepared: Prepared, base: Base, steps: int, tick: Callable[[int, int], None]) -> RangeTest:
    """Run the test on the adapter that training would begin with; nothing is saved.

    Args:
        base: a base without adapter; it is not usable for anything else afterwards.
        tick: told (step, steps) after each step.
    """
    objective = make_objective(task, prepared.data.kind, prepared.train)
    clock = attach_adapter(task, base.model, reference=objective.has_reference).clock
    model = optimize_model(base.model)
    adapter = adapter_state(base.model)
    sizing = size_up(task, prepared, base.model, model, available_memory(base.model.device))
    limit = MicroBatchLimit(sizing.micro_rows, sizing.micro_tokens, noun=objective.noun)
    optimizer = make_optimizer(adapter, task.train)
    rows = prepared.train.rows
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    with running_layers(base.model, sizing.gradient_checkpointing):
        for step in range(steps):
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1))
            batch = step_rows(rows, objective.unit, task.seed, step, task.train.batch_size)
            result = train_step(
                model,
                list(adapter.values()),
                batch,
                limit,
                clock,
                (task.seed, step),
                task.train.max_grad_norm,
                objective,
            )
            tick(step + 1, steps)
            if not math.isfinite(result.loss) or not math.isfinite(result.gradient_norm):
                break
            mean = SMOOTHING * mean + (1 - SMOOTHING) * result.loss
            rates.append(rate)
            losses.append(mean / (1 - SMOOTHING ** (step + 1)))
            if losses[-1] > BLOWN_UP * min(losses) and step > steps // 4:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    if not rates:
        raise DivergedError("the loss is not finite from the first step", "look at the data with `tunery check`")
    return suggest(rates, losses)


def suggest(rates: list[float], losses: list[float]) -> RangeTest:
    """Read a rate off a curve: a third of the rate with the lowest loss, which leaves room before it blows up.

    The test raises the rate while the loss falls anyway, so the lowest point lies at a rate already too high to train
    with; a third of it is half a decade below.
    """
    best = min(range(len(losses)), key=losses.__getitem__)
    fallen = (losses[0] - losses[best]) / max(losses[0], 1e-9)
    if fallen < 0.02:
        return RangeTest(rates, losses, rates[len(rates) // 2], "the loss hardly moved: the suggestion is a guess")
    suggestion = float(f"{rates[best] / 3:.1e}")
    if losses[-1] < (1 + RISEN) * losses[best]:
        words = (
            f"the loss never rose, up to a rate of {rates[-1]:.1e}: where it blows up was not found, and a third of "
            "the rate with the lowest loss is a guess; more steps tell more (--lr-steps)"
        )
        return RangeTest(rates, losses, suggestion, words)
    words = f"the loss was lowest at {rates[best]:.1e}; a third of that leaves room before it rises"
    return RangeTest(rates, losses, suggestion, words)
