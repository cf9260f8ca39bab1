"""Reading a rate off the curve of a range test."""

from __future__ import annotations

import math

from tunery.training.lr_test import suggest


def test_the_suggestion_lies_below_the_lowest_point() -> None:
    rates = [1e-5 * 1.3**i for i in range(30)]
    losses = [2 - math.exp(-((math.log(r) - math.log(3e-3)) ** 2)) for r in rates]
    result = suggest(rates, losses)
    assert 5e-4 < result.suggestion < 2e-3
    drawing = result.draw()
    assert drawing.count("●") > 10
    assert "┊" in drawing


def test_a_flat_curve_is_called_a_guess() -> None:
    assert "guess" in suggest([1e-5, 1e-4, 1e-3], [1.0, 1.0, 1.0]).reason
