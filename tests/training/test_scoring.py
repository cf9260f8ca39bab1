"""Rows scored on several cores: the same numbers as in one process, whichever adapter is active."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.double import Double
from tests.training.test_gradients import lora_model, make_rows
from tunery.fast.packed_model import PackedModel
from tunery.lora.attach import disabled
from tunery.training import scoring
from tunery.training.objectives.dpo import DPO
from tunery.training.objectives.sft import CrossEntropy
from tunery.training.scoring import Scorer, score, scoring_functions
from tunery.training.worker_pool import Function, WorkerPool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked under Linux only")


@pytest.fixture
def model() -> Iterator[PackedModel]:
    with Double():
        model, adapter = lora_model("llama")
        with torch.no_grad():
            for number, tensor in enumerate(adapter.values()):
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
        yield model


def in_double(work: Function) -> Function:
    """Workers compute in a thread of their own, to which the mode around a test does not reach."""

    def wrapped(argument: Any) -> Any:
        with Double():
            return work(argument)

    return wrapped


@contextmanager
def scorer(model: PackedModel, count: int) -> Iterator[Scorer]:
    pool = WorkerPool({name: in_double(work) for name, work in scoring_functions(model).items()}, count, 1)
    try:
        yield Scorer(model, pool)
    finally:
        pool.close()


@pytest.mark.parametrize("count", [2, 3])
def test_workers_score_each_row_as_one_process_does(model: PackedModel, count: int) -> None:
    rows = make_rows(3, 11)
    alone = score(model, rows)
    with scorer(model, count) as several:
        together = several(rows)
    assert together.log_probability.tolist() == pytest.approx(alone.log_probability.tolist(), rel=1e-9)
    assert together.mean_loss == pytest.approx(alone.mean_loss, rel=1e-9)
    assert together.accuracy == pytest.approx(alone.accuracy, rel=1e-9)


def test_workers_follow_the_adapter_that_is_active_here(model: PackedModel) -> None:
    rows = make_rows(4, 6)
    with scorer(model, 2) as several:
        with disabled(model.model):
            base, base_alone = several(rows), score(model, rows)
        tuned = several(rows)
    assert base.log_probability.tolist() == pytest.approx(base_alone.log_probability.tolist(), rel=1e-9)
    assert not np.allclose(base.log_probability, tuned.log_probability, rtol=1e-6)


@pytest.mark.parametrize("objective", [CrossEntropy(), DPO(0.1)])
def test_a_validation_by_workers_is_that_of_one_process(model: PackedModel, objective: CrossEntropy | DPO) -> None:
    rows = make_rows(5, 8)
    loss, metrics = objective.measure(Scorer(model), rows)
    with scorer(model, 2) as several:
        found, found_metrics = objective.measure(several, rows)
    assert found == pytest.approx(loss, rel=1e-9)
    assert found_metrics == pytest.approx(metrics, rel=1e-9)


def test_where_workers_are_lost_this_process_scores_alone(model: PackedModel) -> None:
    rows = make_rows(6, 5)
    with scorer(model, 3) as several:
        assert several.pool is not None
        os.kill(several.pool.pids[0], signal.SIGKILL)
        found = [several(rows).mean_loss for _ in range(2)]
    assert found == pytest.approx([score(model, rows).mean_loss] * 2, rel=1e-9)


def test_fewer_rows_than_workers_and_none(model: PackedModel) -> None:
    with scorer(model, 3) as several:
        for count in (0, 1, 2):
            rows = make_rows(7, 2)[:count]
            assert several(rows).log_probability.tolist() == pytest.approx(
                score(model, rows).log_probability.tolist(), rel=1e-9
            )


def test_the_tasks_number_of_workers_is_kept(model: PackedModel) -> None:
    rows = make_rows(8, 4)
    with scoring.scoring(model, rows, 1) as alone, scoring.scoring(model, rows, 2) as two:
        assert alone.pool is None
        assert two.pool is not None
        assert two.pool.count == 2


def test_where_memory_runs_out_in_a_worker_this_process_scores_alone_and_says_so(
    model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, here, said = make_rows(9, 6), os.getpid(), []
    alone = score(model, rows).mean_loss

    def full(asked: Any) -> Any:
        if os.getpid() != here:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return in_double(scoring_functions(model)["score"])(asked)

    pool = WorkerPool({"score": full}, 2, 1)
    try:
        several = Scorer(model, pool, said.append)
        assert [several(rows).mean_loss for _ in range(2)] == pytest.approx([alone, alone], rel=1e-9)
    finally:
        pool.close()
    (note,) = said
    assert note.level == "warn"
    assert "memory ran out in a worker process" in note.message


def test_where_no_process_can_be_started_this_one_scores(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    with scoring.scoring(model, make_rows(8, 4), 2) as scorer:
        assert scorer.pool is None
