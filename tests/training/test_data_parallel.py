"""Workers on the cores of one CPU: the same update as one process, and nothing lost when one of them ends."""

from __future__ import annotations

import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.double import Double
from tests.training.test_gradients import lora_model, make_rows, tree_rows
from tunery.data.batching import Row, deal, pack
from tunery.lora.attach import lora_layers
from tunery.lora.dropout import DropoutClock
from tunery.training import data_parallel, worker_pool
from tunery.training.data_parallel import StepPart, Workers, backward_part
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import StepResult, train_step
from tunery.training.objectives.base import Objective, StepStats
from tunery.training.objectives.dpo import DPO
from tunery.training.objectives.sft import CROSS_ENTROPY
from tunery.training.worker_pool import WorkerLostError, WorkerPool, wanted_workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked under Linux only")

Wrap = Callable[[Callable[[StepPart], StepStats]], Callable[[StepPart], StepStats]]


class Setup:
    """A tiny float64 model with an adapter, and steps of it."""

    def __init__(self, shape: str = "llama", objective: Objective = CROSS_ENTROPY, dropout: float = 0.0) -> None:
        with Double():
            self.model, adapter = lora_model(shape)
        self.parameters, self.objective, self.clock = list(adapter.values()), objective, DropoutClock()
        if dropout:
            for layer in lora_layers(self.model.model).values():
                for name, drop in layer.dropouts.items():
                    layer.dropouts[name] = type(drop)(dropout, self.clock, drop.layer)

    @contextmanager
    def workers(self, count: int, wrap: Wrap = lambda backward: backward) -> Iterator[Workers]:
        def backward(part: StepPart) -> StepStats:
            with Double():
                return backward_part(self.model, self.clock, self.objective, part)

        workers = Workers(self.parameters, wrap(backward), count, threads=1)
        try:
            yield workers
        finally:
            workers.close()

    def step(
        self, rows: Sequence[Row], workers: Workers | None = None, limit: MicroBatchLimit | None = None
    ) -> tuple[StepResult, list[torch.Tensor]]:
        """A step's result and its gradient."""
        limit = limit or MicroBatchLimit(len(rows))
        with Double():
            result = train_step(
                self.model, self.parameters, rows, limit, self.clock, (0, 3), None, self.objective, workers
            )
        return result, [p.grad.clone() for p in self.parameters if p.grad is not None]


def assert_same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], tolerance: float = 1e-9) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert float((a - b).norm()) <= tolerance * max(1e-6, float(b.norm()))


@pytest.mark.parametrize("shape", ["llama", "gpt2", "qwen3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("count", [2, 3])
def test_workers_give_the_gradient_of_one_process(shape: str, count: int) -> None:
    setup, rows = Setup(shape), make_rows(1, 7)
    alone, wanted = setup.step(rows)
    with setup.workers(count) as workers:
        together, found = setup.step(rows, workers)
    assert_same(found, wanted)
    assert together.loss == pytest.approx(alone.loss, rel=1e-12)
    assert together.sums.trained_tokens == alone.sums.trained_tokens
    assert together.sums.data_tokens == alone.sums.data_tokens


def test_an_optimizer_step_here_is_one_in_every_worker() -> None:
    rows = [make_rows(seed, 6) for seed in range(4)]
    adapters = []
    for count in (1, 3):
        setup = Setup()
        optimizer = torch.optim.AdamW(setup.parameters, lr=1e-2, fused=True)
        with setup.workers(count) as workers:
            for batch in rows:
                setup.step(batch, workers)
                optimizer.step()
            adapters.append([p.detach().clone() for p in setup.parameters])
    assert_same(adapters[1], adapters[0], 1e-7)


def test_pairs_stay_together_and_their_metrics_add_up() -> None:
    rows = make_rows(2, 8)
    setup = Setup(objective=DPO(0.1))
    alone, wanted = setup.step(rows, limit=MicroBatchLimit(4))
    with setup.workers(2) as workers:
        together, found = setup.step(rows, workers, MicroBatchLimit(4))
    assert_same(found, wanted)
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-9)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_short_last_step_leaves_workers_without_rows(rows: int) -> None:
    setup, given_rows = Setup(), make_rows(3, rows)
    _, wanted = setup.step(given_rows)
    with setup.workers(3) as workers:
        setup.step(make_rows(4, 9), workers)  # an earlier step's gradients must not be added again
        _, found = setup.step(given_rows, workers)
    assert_same(found, wanted)


def test_dropout_masks_follow_from_the_step_and_differ_between_workers() -> None:
    rows = [text(30, seed=1), text(30, seed=2)]
    found = []
    for _ in range(2):
        setup = Setup(dropout=0.5)
        with setup.workers(2) as workers:
            found.append(setup.step(rows, workers)[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def in_turn(first: Sequence[int]) -> list[torch.Tensor]:
        setup = Setup(dropout=0.5)
        parts = data_parallel.split(rows, 2, 1, 0.0, MicroBatchLimit(2), (0, 3), CROSS_ENTROPY.weight(rows))
        with Double():
            for part, number in zip(parts, first, strict=True):
                backward_part(setup.model, setup.clock, CROSS_ENTROPY, replace(part, first=number))
        return [p.grad for p in setup.parameters if p.grad is not None]

    assert_same(found[0], in_turn([0, data_parallel.MICRO_BATCHES]))
    with pytest.raises(AssertionError):
        assert_same(found[0], in_turn([0, 0]))


def test_where_memory_runs_out_in_a_worker_the_step_is_computed_in_smaller_parts() -> None:
    setup, rows = Setup(), make_rows(6, 8)
    _, wanted = setup.step(rows)

    def short(backward: Callable[[StepPart], StepStats]) -> Callable[[StepPart], StepStats]:
        def work(part: StepPart) -> StepStats:
            if part.first and part.max_units > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
            return backward(part)

        return work

    limit = MicroBatchLimit(8)
    with setup.workers(2, short) as workers:
        _, found = setup.step(rows, workers, limit)
    assert (limit.halvings, limit.rows) == (2, 2)
    assert_same(found, wanted)


def test_what_a_worker_raises_is_told_with_its_traceback() -> None:
    def broken(backward: Callable[[StepPart], StepStats]) -> Callable[[StepPart], StepStats]:
        def work(part: StepPart) -> StepStats:
            if part.first:
                raise ValueError("a bug")
            return backward(part)

        return work

    setup = Setup()
    with setup.workers(2, broken) as workers, pytest.raises(RuntimeError, match=r"(?s)ValueError: a bug.*Traceback"):
        setup.step(make_rows(7, 4), workers)


def test_a_worker_that_is_killed_is_named_and_can_be_resumed_from() -> None:
    def killed(backward: Callable[[StepPart], StepStats]) -> Callable[[StepPart], StepStats]:
        def work(part: StepPart) -> StepStats:
            if part.first:
                os.kill(os.getpid(), signal.SIGKILL)
            return backward(part)

        return work

    setup = Setup()
    with setup.workers(2, killed) as workers, pytest.raises(WorkerLostError, match=r"signal 9; .*memory") as caught:
        setup.step(make_rows(8, 4), workers)
    assert caught.value.exit_code == 75
    assert "train.cpu_workers=1" in str(caught.value)


def test_workers_do_what_they_are_told() -> None:
    setup = Setup()
    calls: list[int] = []
    workers = Workers(
        setup.parameters,
        lambda part: StepStats(loss=float(len(calls))),
        2,
        1,
        functions={"recompute": lambda _: calls.append(os.getpid())},
    )
    try:
        workers.pool.call("recompute", [None, None])
        assert calls == [os.getpid()]  # once here, and once in the worker's own memory
        rows = make_rows(9, 2)
        parts = [StepPart(rows[:1], 1, None, (0, 0), 0, 1.0), StepPart(rows[1:], 1, None, (0, 0), 1, 1.0)]
        assert workers.run(parts).loss == 2.0
    finally:
        workers.close()


def test_workers_end_with_the_process_that_started_them() -> None:
    program = (
        "import os, torch, time\n"
        "from tunery.training.data_parallel import Workers\n"
        "workers = Workers([torch.nn.Parameter(torch.zeros(3))], None, 3, 1)\n"
        "print(*workers.pool.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGINT)  # a Ctrl-C meant for the main process
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until, "workers outlive their parent"
        time.sleep(0.05)


def test_workers_can_be_forked_by_a_thread() -> None:
    setup, rows = Setup(), make_rows(1, 6)
    _, wanted = setup.step(rows)
    found: list[torch.Tensor] = []

    def work() -> None:
        with setup.workers(2) as workers:
            found.extend(setup.step(rows, workers)[1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert_same(found, wanted)


@pytest.mark.slow
def test_a_worker_compiles_though_its_parent_has_compiled_before() -> None:
    def compiled(number: float) -> float:
        torch.compiler.reset()
        return float(torch.compile(lambda x: (x * number).sin().sum())(torch.full((8,), 1.0)))

    here, there = (1 + secrets.randbelow(10**6) / 1e6 for _ in range(2))  # which no cache knows
    compiled(here)  # by threads that no forked process has
    pool = WorkerPool({"compiled": compiled}, 2, 1)
    try:
        assert pool.call("compiled", [here, there])[1] == pytest.approx(8 * math.sin(there), rel=1e-5)
    finally:
        pool.close()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --------------------------------------------------------------------------- how rows are dealt


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 20), parts=st.integers(1, 5), unit=st.sampled_from([1, 2]))
def test_every_row_is_dealt_once_and_units_stay_together(seed: int, count: int, parts: int, unit: int) -> None:
    rows = [Row(row.ids, row.weights, "", number) for number, row in enumerate(tree_rows(seed, count * unit))]
    dealt, cost = deal(rows, parts, unit, 0.01)
    assert sorted(row.example for part in dealt for row in part) == list(range(len(rows)))
    assert 1 <= len(dealt) <= parts
    for part in dealt:
        numbers = [row.example for row in part]
        assert unit == 1 or all(b == a + 1 for a, b in zip(numbers[0::2], numbers[1::2], strict=True))
    assert cost <= deal(rows, 1, unit, 0.01)[1] + 1e-9
    assert cost >= max(deal(part, 1, unit, 0.01)[1] for part in dealt) - 1e-9


def text(length: int, stem: Sequence[int] = (), seed: int = 0) -> Row:
    own = np.random.default_rng([seed, length]).integers(3, 60, length - len(stem))
    ids = np.concatenate([np.asarray(stem, np.int64), own]).astype(np.int32)
    return Row(ids, np.concatenate([[0], np.ones(length - 1)]).astype(np.float32))


def test_rows_with_one_prefix_go_to_one_worker() -> None:
    stems = [[3] * 80, [4] * 80]
    rows = [text(90, stems[i % 2], seed=i) for i in range(12)]
    dealt, _ = deal(rows, 2)
    assert sorted(len({int(row.ids[0]) for row in part}) for part in dealt) == [1, 1]
    assert sum(len(pack(part).ids) for part in dealt) == len(pack(rows).ids)


def test_long_rows_are_spread() -> None:
    rows = [text(length, seed=length) for length in (400, 390, 30, 25, 20, 15)]
    dealt, cost = deal(rows, 2)
    assert cost <= 1.05 * sum(len(row.inputs) for row in rows) / 2
    assert [sum(len(row.ids) > 300 for row in part) for part in dealt] == [1, 1]


def test_workers_are_wanted_where_rows_share_little(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Setup().model
    apart = [[text(60, seed=seed) for seed in range(16)]]
    shared = [[text(60, list(range(3, 58)), seed=seed) for seed in range(16)]]
    assert wanted_workers(model, apart, 1, 2) == 2
    assert wanted_workers(model, shared, 1, 2) == 1
    assert wanted_workers(model, [[text(60)]], 1, 2) == 1
    assert wanted_workers(model, apart, 1, 1) == 1
    monkeypatch.setattr(worker_pool.sys, "platform", "darwin")
    assert wanted_workers(model, apart, 1, 2) == 1


def test_part_limits_keep_the_limit_of_the_step() -> None:
    rows = [text(40, seed=seed) for seed in range(8)]
    parts = data_parallel.split(rows, 2, 1, 0.0, MicroBatchLimit(4, tokens=100), (0, 0), 1.0)
    assert [(part.max_units, part.max_tokens) for part in parts] == [(2, 50)] * 2
    assert math.isclose(sum(len(part.rows) for part in parts), 8)
    assert len({part.first for part in parts}) == 2
    assert len(data_parallel.split(rows, 2, 1, 0.0, MicroBatchLimit(1), (0, 0), 1.0)) == 1
