"""The learning rate of a step: warm-up, then a fall to zero. Pure functions of the step number."""

from __future__ import annotations

import math
from typing import Literal

Scheduler = Literal["linear", "cosine", "constant"]

FULL_FINE_TUNING_RATE = 5e-5
"""A usual rate for full fine-tuning at hidden size `REFERENCE_HIDDEN_SIZE`."""
REFERENCE_HIDDEN_SIZE = 2000
LORA_FACTOR = 10
LOWEST_RATE, HIGHEST_RATE = 1e-4, 1e-3


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, scheduler: Scheduler) -> float:
    """The rate used for the update of `step`.

    During warm-up the rate is peak · step / warmup_steps, so the first step already learns and step `warmup_steps` has
    the peak. From there `linear` and `cosine` fall so that zero would be met one step after the last: no step is
    spent at rate zero.

    Args:
        step: counted from 1 to `total_steps`; later steps get zero (or the peak, if constant).
        peak: the highest rate.
        total_steps: optimizer steps of the whole run, warm-up included.
        warmup_steps: as given by the function of that name.
        scheduler: linear, cosine (half a cosine period, Loshchilov & Hutter 2017, arXiv:1608.03983) or constant.

    Raises:
        ValueError: `step` is below 1, or the scheduler is unknown.
    """
    if step < 1:
        raise ValueError(f"steps are counted from 1, got {step}")
    if scheduler not in ("linear", "cosine", "constant"):
        raise ValueError(f"unknown scheduler {scheduler!r}")
    if step < warmup_steps:
        return peak * step / warmup_steps
    if scheduler == "constant":
        return peak
    start = max(warmup_steps, 1)
    progress = min(1.0, (step - start) / max(total_steps + 1 - start, 1))
    if scheduler == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(warmup: float, total_steps: int) -> int:
    """The setting `train.warmup` in steps: below 1 a fraction of `total_steps` (rounded), else a number of steps.

    Never more than `total_steps`.

    Raises:
        ValueError: `warmup` is negative.
    """
    if warmup < 0:
        raise ValueError(f"warm-up cannot be negative, got {warmup}")
    return min(total_steps, round(warmup * total_steps if warmup < 1 else warmup))


def auto_learning_rate(hidden_size: int) -> float:
    """The rate used for `learning_rate: auto`: 10 · 5e-5 · sqrt(2000 / hidden_size), within 1e-4 and 1e-3, two digits.

    LoRA wants about ten times the rate of full fine-tuning, at any rank, and wider models want lower rates (Schulman
    et al. 2025, "LoRA Without Regret", Thinking Machines Lab). How fast the rate should fall with the width differs
    from one model family to the next; the square root is a middle way.

    Args:
        hidden_size: width of the model's residual stream.

    Raises:
        ValueError: `hidden_size` is not positive.
    """
    if hidden_size < 1:
        raise ValueError(f"a hidden size is positive, got {hidden_size}")
    rate = LORA_FACTOR * FULL_FINE_TUNING_RATE * math.sqrt(REFERENCE_HIDDEN_SIZE / hidden_size)
    return float(f"{min(max(rate, LOWEST_RATE), HIGHEST_RATE):.2g}")
