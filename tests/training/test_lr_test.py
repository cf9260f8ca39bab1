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


def test_a_curve_that_never_rose_is_named_as_such() -> None:
    rates = [1e-5 * 1.3**i for i in range(30)]
    result = suggest(rates, [3.0 - 0.05 * i for i in range(30)])
    assert "the loss never rose, up to a rate of 2.0e-02" in result.reason
    assert "--lr-steps" in result.reason
    assert "never rose" not in suggest(rates, [abs(20 - i) / 10 + 1 for i in range(30)]).reason
