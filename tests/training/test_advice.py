"""Advice on synthetic noisy curves: it is given when due, and rarely when not. All draws are seeded."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from tunery.training.advice import advise

Curve = Callable[[float], float]
STEPS = 160
RUNS = 60


def history(
    seed: int, train: Curve, valid: Curve | None = None, *, noise: float = 0.05, decay: bool = True
) -> list[dict[str, Any]]:
    """A run of STEPS steps with ten validations; curves are functions of the share of the run done."""
    random_ = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        done = step / STEPS
        rate = 1e-3 * min(1.0, step / 8) * ((1 - done) if decay else 1.0)
        loss = max(0.01, train(done) * (1 + random_.gauss(0, noise)))
        lines.append({"step": step, "train_loss": loss, "learning_rate": rate})
        if valid and step % (STEPS // 10) == 0:
            lines.append({"step": step, "valid_loss": valid(done) * (1 + random_.gauss(0, 0.01))})
    return lines


def codes(lines: list[dict[str, Any]]) -> set[str]:
    """What a run was told in all, asked at each validation as the training loop does."""
    ends = [i + 1 for i, line in enumerate(lines) if "valid_loss" in line] or range(10, len(lines) + 1, 10)
    return {advice.code for end in ends for advice in advise(lines[:end])}


def share(code: str, make: Callable[[int], list[dict[str, Any]]]) -> float:
    return sum(code in codes(make(seed)) for seed in range(RUNS)) / RUNS


def learning(done: float) -> float:
    return 1.2 + 1.8 * math.exp(-4 * done)


def converging_low(done: float) -> float:
    return 0.2 + 2.5 * math.exp(-12 * done)


def slow(done: float) -> float:
    return 2.5 - 0.5 * done


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("train", [learning, converging_low])
@pytest.mark.parametrize("decay", [True, False])
def test_a_healthy_run_is_left_alone(train: Curve, noise: float, decay: bool):
    wrong = sum(
        bool(codes(history(seed, train, train, noise=noise, decay=decay)) - {"plateau"}) for seed in range(RUNS)
    )
    assert wrong / RUNS <= 0.05


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("train", [learning, converging_low])
def test_a_converged_run_is_no_plateau(train: Curve, noise: float):
    assert share("plateau", lambda seed: history(seed, train, noise=noise)) <= 0.05


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1, 0.2])
def test_a_slow_but_steady_fall_is_no_plateau(noise: float):
    assert share("plateau", lambda seed: history(seed, slow, noise=noise, decay=False)) <= 0.1


@pytest.mark.parametrize("decay", [True, False])
def test_a_run_that_never_learns_is_a_plateau(decay: bool):
    assert share("plateau", lambda seed: history(seed, lambda _: 3.0, noise=0.05, decay=decay)) >= 0.9


def test_a_run_stuck_high_after_a_first_fall_is_a_plateau():
    def stuck(done: float) -> float:
        return 2.0 + 2.0 * math.exp(-60 * done)

    found = [advice for advice in advise(history(1, stuck, noise=0.03, decay=False)) if advice.code == "plateau"]
    assert "about 2.0" in found[0].message
    assert found[0].hint is not None
    assert "learning_rate (it was 0.001)" in found[0].hint
    assert "scheduler" in found[0].hint


def test_the_first_steps_and_the_warm_up_are_no_plateau():
    flat = [{"step": i, "train_loss": 3.0, "learning_rate": 1e-3} for i in range(1, 80)]
    assert advise(flat) == []
    warming = [{"step": i, "train_loss": 3.0 + 0.001 * (i % 3), "learning_rate": 1e-6 * i} for i in range(1, 300)]
    assert advise(warming) == []


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
def test_overfit_is_seen(noise: float):
    def falling(done: float) -> float:
        return 2.5 * math.exp(-1.5 * done)

    def valley(done: float) -> float:
        return 1.5 + 2 * (done - 0.4) ** 2

    assert share("overfit", lambda seed: history(seed, falling, valley, noise=noise)) >= 0.95


def test_overfit_names_the_best_step_and_what_helps():
    lines: list[dict[str, Any]] = [{"step": i, "train_loss": 2 - i / 100} for i in range(1, 101)]
    for step, loss in ((20, 1.5), (40, 1.2), (60, 1.3), (80, 1.5), (100, 1.7)):
        lines.append({"step": step, "valid_loss": loss})
    (advice,) = advise(lines)
    assert advice.code == "overfit"
    assert "best at step 40 (1.20)" in advice.message
    assert "now 1.70" in advice.message
    assert advice.hint is not None
    assert all(word in advice.hint for word in ("early_stopping", "epochs", "dropout", "more rows"))


def test_two_worse_validations_are_not_enough():
    lines: list[dict[str, Any]] = [{"step": i, "train_loss": 2 - i / 100} for i in range(1, 81)]
    lines += [{"step": s, "valid_loss": v} for s, v in ((20, 1.5), (40, 1.2), (60, 1.3), (80, 1.5))]
    assert advise(lines) == []


def test_a_flat_noisy_validation_is_no_overfit():
    assert share("overfit", lambda seed: history(seed, slow, lambda _: 2.2)) <= 0.05


def test_validation_rising_with_training_is_no_overfit():
    rising = history(0, lambda done: 2 + done / 4, lambda done: 2 + done, noise=0.02)
    assert "overfit" not in codes(rising)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
def test_divergence_is_seen_and_said_alone(noise: float):
    assert share("diverging", lambda seed: history(seed, lambda done: 2 + 4 * done, noise=noise)) >= 0.95
    (advice,) = advise(history(0, lambda done: 2 + 4 * done, noise=noise))
    assert advice.code == "diverging"
    assert advice.hint is not None
    assert "lower train.learning_rate" in advice.hint


def test_a_single_spike_is_no_divergence():
    lines = history(0, learning)
    lines[-1]["train_loss"] = 50.0
    assert "diverging" not in {advice.code for advice in advise(lines)}


@pytest.mark.parametrize(
    "lines", [[], [{"step": 1}], [{"train_loss": None, "step": 1}] * 300, [{"train_loss": 1.0}] * 300]
)
def test_empty_and_holey_histories_give_nothing(lines: list[dict[str, Any]]):
    assert advise(lines) == []
