"""Comparing what our functions give with what they stand in for, before they are used."""

from __future__ import annotations

import math

from torch import Tensor


def relative_difference(got: Tensor, wanted: Tensor, floor: float = 1e-30) -> float:
    """‖got - wanted‖ / ‖wanted‖, taken in float64; infinite if either holds a NaN.

    Args:
        floor: the least that is divided by.
    """
    got, wanted = got.double(), wanted.double()
    difference = float((got - wanted).norm() / wanted.norm().clamp_min(floor))
    return math.inf if math.isnan(difference) else difference  # max() of a NaN may be anything
