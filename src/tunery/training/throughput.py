"""Whether a run computes as fast as its machine can: the fraction of the matmul rate that it reaches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from tunery.fast.packed_model import PackedModel
from tunery.lora.attach import adapter_names, trainable_parameters
from tunery.models.device import matmul_rate, probe_precision
from tunery.progress import Note
from tunery.training.flops import step_flops
from tunery.training.objectives.base import REFERENCE

FIRST_STEPS = 3
"""Steps of a run before the look at its speed; the first one warms up."""

SLOW_FRACTION = 0.1
"""Below this fraction of the matmul rate something is wrong: the lowest that a quiet machine has shown is 0.22, for
single short rows (docs/benchmarks.md)."""

SLOW_SECONDS = 1.0
"""Shorter steps are not looked at: the fixed cost of small operations rules there, and little time is lost."""

ATTEMPTS = 5
PAUSE_SECONDS = 0.2


class Counts(Protocol):
    """What the number of operations follows from: a step's StepStats, or a whole run's TrainerState."""

    computed_tokens: int
    positions: int
    pairs: int


def training_flops(model: PackedModel, counts: Counts, passes: int) -> float:
    """Floating-point operations that the steps with these counts need; `passes` as in step_flops."""
    trainable = sum(tensor.numel() for tensor in trainable_parameters(model.model))
    reference = trainable if REFERENCE in adapter_names(model.model) else 0
    return step_flops(
        model.model,
        counts.computed_tokens,
        counts.positions,
        trainable,
        passes,
        counts.pairs,
        model.last_layer_parameters,
        reference,
    )


def matmul_fraction(model: PackedModel, flops_per_second: float) -> tuple[float | None, float]:
    """(fraction, matmul rate): what part of the rate that matmuls alone reach now a run has reached.

    A rate below what the run reached was measured beside another program: it is measured again, and without a sound one
    the fraction is None.
    """
    rate = 0.0
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS)
        rate = max(rate, matmul_rate(model.device, model.model.dtype))
        if flops_per_second <= rate:
            return flops_per_second / rate, rate
    return None, rate


@dataclass
class SpeedCheck:
    """Looks at the first steps of a run on a CPU, and says what is wrong where they are far slower than promised.

    Attributes:
        promised: floating-point operations per second of matmuls alone before the run.
        chosen: the dtype was chosen by a probe, not set.
    """

    model: PackedModel
    passes: int
    promised: float
    chosen: bool
    _steps: int = 0
    _best: float = 0.0

    def look(self, counts: Counts, seconds: float) -> Note | None:
        """Take one step's counts and its seconds; the warning, once, when it is due."""
        self._steps += 1
        if self._steps == 1 or self._steps > FIRST_STEPS or seconds < SLOW_SECONDS:
            return None
        self._best = max(self._best, training_flops(self.model, counts, self.passes) / seconds)
        if self._steps < FIRST_STEPS or self._best >= SLOW_FRACTION * self.promised:
            return None
        return self._why()

    def _why(self) -> Note:
        share = f"the first steps reach {self._best / self.promised:.1%} of what matmuls alone reached before the run"
        dtype = self.model.model.dtype
        if self.chosen and (again := probe_precision(self.model.device)).choice != dtype:
            name = str(again.choice).removeprefix("torch.")
            return Note(
                f"{share}: {again.reason}",
                level="warn",
                code="slow",
                hint=f"start over in {name}",
                command=f"--resume never --set train.precision={name}",
            )
        now = matmul_rate(self.model.device, dtype)
        if now < self.promised / 2:
            return Note(
                f"{share}, and these reach {now / self.promised:.0%} of it now: other programs are computing on the "
                "same cores",
                level="warn",
                code="slow",
                hint="end them, or give this run fewer threads (OMP_NUM_THREADS)",
            )
        hint = "please report it with the receipt: this processor, or this model, computes in an odd way"
        return Note(share, level="warn", code="slow", hint=hint)


def speed_check(model: PackedModel, passes: int, *, chosen: bool) -> SpeedCheck | None:
    """For a run on a CPU; None elsewhere, where the fixed cost of small operations depends on the host."""
    if model.device.type != "cpu" or model.model.dtype not in (torch.float32, torch.bfloat16):
        return None
    return SpeedCheck(model, passes, matmul_rate(model.device, model.model.dtype), chosen)
