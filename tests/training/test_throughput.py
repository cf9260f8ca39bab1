"""A run that is far slower than its machine promised says why, and no fraction above one is ever told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.support.shapes import tiny_model
from tunery.fast.adapters import apply_lora
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.models.device import PrecisionProbe
from tunery.training import throughput
from tunery.training.throughput import SpeedCheck, matmul_fraction, training_flops


@dataclass
class Step:
    """Of one optimizer step."""

    computed_tokens: int = 1000
    positions: int = 100
    pairs: int = 0


@pytest.fixture(name="model")
def _model() -> PackedModel:
    return optimize_model(apply_lora(tiny_model("llama"), rank=4))


def rates(monkeypatch: pytest.MonkeyPatch, *found: float) -> None:
    """What each further measurement of the matmul rate finds."""
    waiting = iter(found)
    monkeypatch.setattr(throughput, "matmul_rate", lambda *_: next(waiting))
    monkeypatch.setattr(throughput, "PAUSE_SECONDS", 0.0)


def check(model: PackedModel, fraction: float, chosen: bool = False) -> SpeedCheck:
    """Of a run whose steps take ten seconds and reach this fraction of what was promised."""
    promised = training_flops(model, Step(), 0) / 10.0 / fraction
    return SpeedCheck(model, 0, promised, chosen)


def test_a_rate_that_was_measured_beside_another_program_is_measured_again(
    model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(monkeypatch, 50.0, 60.0, 200.0)
    assert matmul_fraction(model, 100.0) == (0.5, 200.0)


def test_a_fraction_above_one_is_not_told(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, *[50.0, 90.0, 60.0, 40.0, 30.0])
    assert matmul_fraction(model, 100.0) == (None, 90.0)


def test_a_neighbour_is_named_once(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    look = check(model, 0.02)
    rates(monkeypatch, 0.1 * look.promised)
    said = [look.look(Step(), 10.0) for _ in range(6)]
    assert [word is not None for word in said] == [False, False, True, False, False, False]
    assert "reach 2.0% of what matmuls alone reached before the run, and these reach 10% of it now" in str(said[2])
    assert "OMP_NUM_THREADS" in str(said[2])


def test_a_dtype_that_was_chosen_wrongly_is_named(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    again = PrecisionProbe(150.0, 16.0, torch.bfloat16, "bfloat16 is 9.4 times as fast as float32 on this cpu")
    monkeypatch.setattr(throughput, "probe_precision", lambda _: again)
    look = check(model, 0.02, chosen=True)
    said = [look.look(Step(), 10.0) for _ in range(3)][2]
    assert str(said).endswith("→ start over in bfloat16: --resume never --set train.precision=bfloat16")


@pytest.mark.parametrize(("fraction", "seconds"), [(0.3, 10.0), (0.02, 0.01)])
def test_usual_steps_and_short_ones_are_not_remarked_upon(model: PackedModel, fraction: float, seconds: float) -> None:
    look = check(model, fraction)
    assert [look.look(Step(), seconds) for _ in range(4)] == [None] * 4


def test_one_slow_step_among_the_first_is_not_remarked_upon(model: PackedModel) -> None:
    look = check(model, 0.02)
    assert [look.look(Step(), seconds) for seconds in (90.0, 1.1, 90.0)] == [None] * 3
