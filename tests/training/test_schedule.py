"""The learning rate over a run."""

from __future__ import annotations

import itertools

import pytest

from tunery.training.schedule import Scheduler, auto_learning_rate, learning_rate, warmup_steps


def curve(scheduler: Scheduler, total: int, warmup: int) -> list[float]:
    return [
        learning_rate(step, peak=1.0, total_steps=total, warmup_steps=warmup, scheduler=scheduler)
        for step in range(1, total + 1)
    ]


def test_linear_without_warmup_starts_at_the_peak_and_would_meet_zero_after_the_last_step():
    assert curve("linear", 4, 0) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_linear_with_warmup():
    assert curve("linear", 6, 3) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_way_down_in_the_middle():
    rates = curve("cosine", 10, 0)
    assert rates[0] == 1.0
    assert rates[5] == pytest.approx(0.5)
    assert all(left > right for left, right in itertools.pairwise(rates))


def test_constant_stays_at_the_peak_after_warmup():
    assert curve("constant", 5, 2) == pytest.approx([0.5, 1, 1, 1, 1])


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 2), (7, 7), (100, 5)])
def test_every_step_learns_and_the_peak_is_reached_and_never_passed(scheduler: Scheduler, total: int, warmup: int):
    rates = curve(scheduler, total, warmup)
    assert min(rates) > 0
    assert max(rates) == 1.0


def test_steps_past_the_end_do_not_rise_again():
    assert learning_rate(50, peak=1.0, total_steps=10, warmup_steps=0, scheduler="cosine") == pytest.approx(0)
    assert learning_rate(50, peak=1.0, total_steps=10, warmup_steps=0, scheduler="linear") == 0


def test_step_zero_and_unknown_schedulers_are_refused():
    with pytest.raises(ValueError, match="from 1"):
        learning_rate(0, peak=1.0, total_steps=10, warmup_steps=0, scheduler="linear")
    with pytest.raises(ValueError, match="step"):
        learning_rate(1, peak=1.0, total_steps=10, warmup_steps=0, scheduler="step")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("warmup", "total", "expected"), [(0, 10, 0), (0.05, 125, 6), (0.07, 100, 7), (1, 10, 1), (20, 10, 10), (0.5, 1, 0)]
)
def test_warmup_is_a_fraction_below_one_else_a_number(warmup: float, total: int, expected: int):
    assert warmup_steps(warmup, total) == expected


def test_negative_warmup_is_refused():
    with pytest.raises(ValueError, match="negative"):
        warmup_steps(-0.1, 10)


@pytest.mark.parametrize(
    ("hidden", "rate"), [(32, 1e-3), (576, 9.3e-4), (2000, 5e-4), (4096, 3.5e-4), (8192, 2.5e-4), (10**6, 1e-4)]
)
def test_automatic_rate(hidden: int, rate: float):
    assert auto_learning_rate(hidden) == rate


def test_automatic_rate_refuses_nonsense():
    with pytest.raises(ValueError, match="positive"):
        auto_learning_rate(0)
