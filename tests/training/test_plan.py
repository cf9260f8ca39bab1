"""What "auto" and the multiplier make of the learning rate."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_llama_config
from tunery.config import TrainConfig
from tunery.training.objectives.dpo import DPO
from tunery.training.objectives.sft import CROSS_ENTROPY
from tunery.training.plan import peak_rate

MODEL = tiny_llama_config(300, width=576)


def rate(**settings: float) -> float:
    return peak_rate(TrainConfig(**settings), MODEL, CROSS_ENTROPY)  # type: ignore[arg-type]


def test_the_multiplier_is_times_the_rate_of_auto_and_times_a_number() -> None:
    assert rate() == 9.3e-4
    assert rate(learning_rate_multiplier=1.8) == pytest.approx(1.8 * 9.3e-4, rel=1e-12)
    assert rate(learning_rate=2e-4) == 2e-4
    assert rate(learning_rate=2e-4, learning_rate_multiplier=0.5) == pytest.approx(1e-4, rel=1e-12)
    pairs = peak_rate(TrainConfig(learning_rate_multiplier=2), MODEL, DPO(0.1))
    assert pairs == pytest.approx(2 * 1.9e-4, rel=1e-12)


@pytest.mark.parametrize("wrong", [0, -1, float("inf")])
def test_a_multiplier_is_a_positive_number(wrong: float) -> None:
    with pytest.raises(ValueError, match="learning_rate_multiplier"):
        TrainConfig(learning_rate_multiplier=wrong)
