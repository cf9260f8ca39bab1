"""KTO training gives the gradient of the plain formula, however it is computed; in float64."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.double import Double
from tests.support.shapes import tiny_model
from tests.training.test_gradients import PLAIN, lora_model, relative, written_out
from tests.training.test_preference import CHECKED, make_pairs, padded_log_probabilities
from tunery.config import Task
from tunery.data.batching import Row
from tunery.data.prepare import Rows
from tunery.errors import ConfigError
from tunery.fast.adapters import apply_lora
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.lora.attach import adapter_state, lora_layers, place
from tunery.lora.dropout import DropoutClock
from tunery.lora.layer import LoRATensors
from tunery.training.data_parallel import Workers, backward_part
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import StepResult, train_step
from tunery.training.objectives.base import REFERENCE
from tunery.training.objectives.kto import KTO, favoured, favoured_interval, mismatched
from tunery.training.scoring import Scorer, scoring_functions

BETA, GOOD, BAD = 0.3, 1.5, 0.7


@pytest.fixture(autouse=True)
def everything_in_float64() -> Iterator[None]:
    with Double():
        yield


def make_feedback(seed: int, count: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    verdicts = [True, False, *(bool(v) for v in rng.integers(0, 2, count))]
    rows = make_pairs(seed, count)[: max(count, 1)]
    return [replace(row, desirable=verdict) for row, verdict in zip(rows, verdicts, strict=False)]


def with_other_answers(rows: Sequence[Row]) -> list[Row]:
    """Each prompt with the answer of the next row, written out."""
    found = []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        prompt = row.ids[: np.flatnonzero(row.weights)[0]]
        start = np.flatnonzero(other.weights)[0]
        weights = np.concatenate([np.zeros(len(prompt)), other.weights[start:]]).astype(np.float32)
        found.append(Row(np.concatenate([prompt, other.ids[start:]]), weights))
    longest = max(len(row.ids) for row in rows)
    return [replace(row, ids=row.ids[-longest:], weights=row.weights[-longest:]) for row in found]


def plain(model: PackedModel, adapter: Mapping[str, Tensor], rows: Sequence[Row]) -> tuple[float, float, list[Tensor]]:
    """(mean loss, z₀, gradient) by the formula, from transformers' own modules over padded batches."""
    policy, own = PLAIN.get(model.model, (model.model, adapter))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(adapter[name])
    base = copy.deepcopy(policy)
    for layer in lora_layers(base).values():
        for name in list(layer.settings):
            layer.discard(name)
    others = with_other_answers(rows)
    with torch.no_grad():
        reference = padded_log_probabilities(base, rows)
        shifted = padded_log_probabilities(policy, others) - padded_log_probabilities(base, others)
        z0 = shifted.mean().clamp(min=0) if len(rows) > 1 else torch.tensor(0.0)
    with written_out():
        ratio = padded_log_probabilities(policy, rows) - reference
        each = [
            GOOD * (1 - torch.sigmoid(BETA * (r - z0))) if row.desirable else BAD * (1 - torch.sigmoid(BETA * (z0 - r)))
            for r, row in zip(ratio, rows, strict=True)
        ]
        loss = torch.stack(each).mean()
        return float(loss.detach()), float(z0), list(torch.autograd.grad(loss, list(own.values())))


def ours(
    model: PackedModel, adapter: Mapping[str, Tensor], rows: Sequence[Row], limit: MicroBatchLimit
) -> tuple[StepResult, list[Tensor]]:
    objective = KTO(BETA, GOOD, BAD)
    result = train_step(model, list(adapter.values()), rows, limit, DropoutClock(), (0, 0), None, objective=objective)
    return result, [t.grad.clone() for t in adapter.values() if t.grad is not None]


@pytest.mark.parametrize("name", CHECKED)
def test_packed_and_micro_batched_answers_give_the_gradient_of_the_formula(name: str) -> None:
    model, adapter = lora_model(name)
    rows = make_feedback(3, 7)
    loss, z0, wanted = plain(model, adapter, rows)
    for limit in (MicroBatchLimit(7), MicroBatchLimit(2), MicroBatchLimit(1), MicroBatchLimit(7, tokens=50)):
        result, got = ours(model, adapter, rows, limit)
        assert result.loss == pytest.approx(loss, rel=1e-9)
        assert result.metrics["kl"] == pytest.approx(z0, rel=1e-9, abs=1e-12)
        assert relative(got, wanted) < 1e-9


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 7), limit=st.integers(1, 7))
def test_random_answers_give_the_gradient_of_the_formula(seed: int, count: int, limit: int) -> None:
    with Double():
        model, adapter = lora_model("llama")
        rows = make_feedback(seed, count)
        loss, _, wanted = plain(model, adapter, rows)
        result, got = ours(model, adapter, rows, MicroBatchLimit(limit))
    assert result.loss == pytest.approx(loss, rel=1e-9)
    assert relative(got, wanted) < 1e-9


def test_the_divergence_is_that_of_the_whole_step_and_counts() -> None:
    seeds = [seed for seed in range(20) if plain(*lora_model("llama"), make_feedback(seed, 6))[1] > 0.01]
    assert seeds, "no step has a divergence above zero"
    model, adapter = lora_model("llama")
    rows = make_feedback(seeds[0], 6)
    objective = KTO(BETA, GOOD, BAD)
    z0 = objective.prepare_step(Scorer(model), rows)
    assert z0 == pytest.approx(plain(model, adapter, rows)[1], rel=1e-9)
    assert objective.measure(Scorer(model), rows)[0] == pytest.approx(plain(model, adapter, rows)[0], rel=1e-9)


def test_a_model_that_runs_row_by_row_gives_the_same_gradient() -> None:
    model, adapter = lora_model("llama")
    rows = make_feedback(5, 6)
    _, wanted = ours(model, adapter, rows, MicroBatchLimit(6))
    alone = replace(model, flattened=False)
    _, got = ours(alone, adapter, rows, MicroBatchLimit(3))
    assert relative(got, wanted) < 1e-9


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_workers_give_the_same_gradient() -> None:
    model, adapter = lora_model("llama")
    rows, objective, parameters = make_feedback(8, 8), KTO(BETA, GOOD, BAD), list(adapter.values())
    _, wanted = ours(model, adapter, rows, MicroBatchLimit(8))
    clock = DropoutClock()

    def work(part: object) -> object:
        with Double():
            return backward_part(model, clock, objective, part)  # type: ignore[arg-type]

    workers = Workers(parameters, work, 2, 1, functions=scoring_functions(model))  # type: ignore[arg-type]
    try:
        train_step(model, parameters, rows, MicroBatchLimit(8), clock, (0, 0), None, objective, workers)
    finally:
        workers.close()
    assert relative([p.grad for p in parameters if p.grad is not None], wanted) < 1e-9


def test_an_adapter_to_start_from_is_the_reference() -> None:
    base = tiny_model("llama", dtype=torch.float64)
    apply_lora(base, rank=4, seed=1)
    pieces = {
        path: LoRATensors(
            layer.settings["default"], layer.lora_A["default"].detach(), torch.randn_like(layer.lora_B["default"])
        )
        for path, layer in lora_layers(base).items()
    }
    place(base, REFERENCE, pieces, trainable=False)
    with torch.no_grad():
        for path, layer in lora_layers(base).items():
            layer.lora_B["default"].copy_(pieces[path].B)
    model, rows = optimize_model(base), make_feedback(4, 5)
    objective = KTO(BETA, GOOD, BAD, reference=REFERENCE)
    loss, metrics = objective.measure(Scorer(model), rows)
    weights = [GOOD if row.desirable else BAD for row in rows]
    assert loss == pytest.approx(sum(weights) / len(rows) / 2, rel=1e-9)  # no reward yet: σ(0) everywhere
    assert metrics["rewards_margin"] == pytest.approx(0, abs=1e-9)
    assert dict(adapter_state(base))


def test_what_is_swapped_keeps_to_the_longest_row_and_keeps_a_prompt() -> None:
    ids = lambda n: np.arange(3, 3 + n, dtype=np.int32)  # noqa: E731
    weights = lambda n, start: np.asarray([0.0] * start + [1.0] * (n - start), np.float32)  # noqa: E731
    rows = [Row(ids(10), weights(10, 8)), Row(ids(10), weights(10, 1)), Row(ids(4), weights(4, 2))]
    swapped = mismatched(rows)
    assert [len(row.ids) for row in swapped] == [10, 3, 4]
    assert [row.trained for row in swapped] == [9, 2, 2]
    assert all(row.weights[0] == 0 for row in swapped)
    assert swapped[0].ids[0] == rows[0].ids[7]  # the last token of its prompt


def rows_of(verdicts: Sequence[bool | None], unit: int = 1) -> Rows:
    return Rows(
        [replace(row, desirable=v) for row, v in zip(make_pairs(1, len(verdicts)), verdicts, strict=False)], unit
    )


def task(**train: object) -> Task:
    return Task.model_validate({"model": "m", "data": {"train": "x", "kind": "feedback"}, "train": train})


def test_the_rarer_side_weighs_more_unless_set() -> None:
    rows = rows_of([True, False, False, False])
    assert KTO.build(task(), rows) == KTO(0.1, 3.0, 1.0)
    assert KTO.build(task(desirable_weight=1.5, beta=0.2), rows) == KTO(0.2, 1.5, 1.0)
    assert KTO.build(task(), rows_of([True, True, False])) == KTO(0.1, 1.0, 2.0)


def test_one_side_alone_a_single_row_and_rows_without_verdicts_are_refused() -> None:
    with pytest.raises(ConfigError, match="no training row has a bad one"):
        KTO.build(task(), rows_of([True, True]))
    with pytest.raises(ConfigError, match="at least 2"):
        KTO.build(task(batch_size=1), rows_of([True, False]))
    with pytest.raises(ConfigError, match="marked good or bad"):
        KTO.select(rows_of([None, None]))


def test_pairs_are_taken_apart() -> None:
    rows = KTO.select(rows_of([True, False, True, False], unit=2))
    assert rows.unit == 1
    assert rows.units == 4


def test_the_share_of_favoured_pairs_and_its_interval() -> None:
    good, bad = np.asarray([1.0, 2.0, 3.0]), np.asarray([0.0, 2.0])
    assert favoured(good, bad) == pytest.approx((1 + 0 + 1 + 0.5 + 1 + 1) / 6)
    assert favoured_interval(1.0, 5, 5) == (1.0, 1.0)
    low, high = favoured_interval(0.8, 40, 40)
    assert 0.69 < low < 0.72
    assert 0.88 < high < 0.91
