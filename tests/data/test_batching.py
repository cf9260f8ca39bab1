"""The order of rows, micro-batches and the prefix tree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.data.batching import (
    PackedBatch,
    Row,
    epoch_order,
    flatten,
    micro_batches,
    rows_of_step,
    steps_per_epoch,
)


def make_rows(seed: int, count: int, *, vocabulary: int = 5, prefixes: int = 2) -> list[Row]:
    """Rows that often share long beginnings, some of them equal or one the beginning of another."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, vocabulary, rng.integers(1, 30)) for _ in range(prefixes)]
    rows = []
    for index in range(count):
        stem = stems[rng.integers(prefixes)]
        ids = np.concatenate([stem[: rng.integers(1, len(stem) + 1)], rng.integers(0, vocabulary, rng.integers(1, 12))])
        weights = (rng.random(len(ids)) < 0.4).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        rows.append(Row(ids.astype(np.int32), weights, f"rows:{index + 1}", index))
    return rows


def visible(batch: PackedBatch) -> list[list[int]]:
    """For every flat token, the tokens it sees: its ancestors' and those of its own node up to itself."""
    seen: list[list[int]] = [[] for _ in batch.ids]
    for group in batch.groups:
        start = group.start
        for length in group.lengths:
            for i in range(length):
                seen[start + i] = [*group.path.tolist(), *range(start, start + i + 1)]
            start += length
    return seen


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 12), share=st.booleans())
def test_every_prediction_sees_its_own_row_and_nothing_else(seed: int, count: int, share: bool) -> None:
    rows = make_rows(seed, count)
    batch = flatten(rows, share=share)
    seen = visible(batch)
    found: dict[int, list[tuple[int, int, float]]] = {i: [] for i in range(count)}
    for entry, target, weight, owner in zip(batch.entry, batch.targets, batch.weights, batch.owners, strict=True):
        context = seen[batch.sources[entry]]
        row = rows[owner]
        assert batch.ids[context].tolist() == row.ids[: len(context)].tolist()
        assert batch.positions[context].tolist() == list(range(len(context)))
        found[owner].append((len(context), int(target), float(weight)))
    for owner, row in enumerate(rows):
        wanted = [(int(t), int(row.ids[t]), 1.0) for t in np.flatnonzero(row.weights)]
        assert sorted(found[owner]) == wanted


def test_a_shared_beginning_is_computed_once() -> None:
    prefix = np.arange(20, dtype=np.int32)
    rows = []
    for end in range(4):
        ids = np.concatenate([prefix, [100 + end, 7, 8]]).astype(np.int32)
        rows.append(Row(ids, np.array([0] * 22 + [1], dtype=np.float32)))
    assert len(flatten(rows).ids) == 20 + 4 * 2
    assert len(flatten(rows, share=False).ids) == 4 * 22
    assert flatten(rows).data_tokens == 4 * 23


def test_nothing_after_the_last_trained_token_is_computed() -> None:
    row = Row(np.arange(10, dtype=np.int32), np.array([0, 0, 0, 1, 0, 0, 0, 0, 0, 0], dtype=np.float32))
    assert flatten([row]).ids.tolist() == [0, 1, 2]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 60), batch=st.integers(1, 20))
def test_each_epoch_visits_every_row_once_and_depends_on_seed_and_epoch_alone(seed: int, rows: int, batch: int) -> None:
    per_epoch = steps_per_epoch(rows, batch)
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        visited = np.concatenate([rows_of_step(seed, step, rows, batch) for step in steps])
        assert sorted(visited.tolist()) == list(range(rows))
        assert visited.tolist() == epoch_order(seed, epoch, rows).tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 15), limit=st.integers(1, 6), tokens=st.integers(1, 80))
def test_micro_batches_hold_every_row_once_within_the_limits(seed: int, count: int, limit: int, tokens: int) -> None:
    rows = make_rows(seed, count)
    parts = list(micro_batches(rows, limit, tokens))
    assert sorted(row.example for part in parts for row in part) == list(range(count))
    for part in parts:
        assert len(part) <= limit
        if len(part) > 1:  # a single row may be longer than the limit; sharing under 8 tokens is not used
            assert len(flatten(part).ids) <= tokens + 8 * len(part)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_visible_pairs_are_those_of_the_whole_mask(window: int | None) -> None:
    from tunery.fast.tree_mask import tree_of

    rng = np.random.default_rng(3)
    stem = rng.integers(3, 60, 20)
    rows = [Row(np.r_[stem, rng.integers(3, 60, n)].astype(np.int32), np.ones(20 + n, np.float32)) for n in (3, 9, 30)]
    batch = flatten(rows)
    assert len(batch.groups) > 1
    assert batch.visible_pairs(window) == int(tree_of(batch.groups).sees(window).sum())
