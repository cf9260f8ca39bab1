"""Comparing what our functions give with what they stand in for, before they are used."""

from __future__ import annotations

from torch import Tensor


def relative_difference(got: Tensor, wanted: Tensor, floor: float = 1e-30) -> float:
    """‖got - wanted‖ / ‖wanted‖, taken in float64; not a number if either holds one.

    Args:
        floor: the least that is divided by.
    """
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(floor))
