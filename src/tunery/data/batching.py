"""Which rows a step trains, and how they become one packed sequence without padding.

The rows of a micro-batch are merged into a prefix tree: tokens that several rows have in common at their start are
computed once. Causal attention makes the hidden states of a shared prefix the same in every row, so neither the loss
nor the gradient changes (gradients flow into the prefix by summation); a float64 test says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MIN_SHARED = 8
"""Shorter common prefixes are not worth a node of their own: attention runs once per group of nodes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised row.

    Attributes:
        ids: int32 [n], the tokens.
        weights: float32 [n]; weights[t] says how much predicting ids[t] from ids[:t] counts. weights[0] is 0.
        where: "file:line" of the example it came from.
        example: index of that example in its split.
        desirable: whether the answer is one to give (of a pair, the chosen one) or one to avoid; None where rows say
            nothing of it.
    """

    ids: np.ndarray
    weights: np.ndarray
    where: str = ""
    example: int = 0
    desirable: bool | None = None

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return int(np.count_nonzero(self.weights))

    @property
    def inputs(self) -> np.ndarray:
        """The tokens that must be computed: nothing after the last trained position matters. int32 [<= n - 1]."""
        positions = np.flatnonzero(self.weights)
        return self.ids[: positions[-1]] if len(positions) else self.ids[:0]


# --------------------------------------------------------------------------- order


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """A permutation of range(rows) that follows from (seed, epoch) alone. int64 [rows]."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(rows)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps in one pass; the last one may hold fewer rows."""
    return -(-rows // batch_size)


def rows_of_step(seed: int, step: int, rows: int, batch_size: int) -> np.ndarray:
    """The row numbers that step `step` (from 0) trains. Resuming therefore replays nothing. int64 [<= batch_size]."""
    epoch, place = divmod(step, steps_per_epoch(rows, batch_size))
    return epoch_order(seed, epoch, rows)[place * batch_size : (place + 1) * batch_size]


def step_rows(rows: Sequence[Row], unit: int, seed: int, step: int, batch_size: int) -> list[Row]:
    """The rows of step `step` (from 0), `batch_size` units of `unit` neighbouring rows each."""
    numbers = rows_of_step(seed, step, len(rows) // unit, batch_size)
    return [row for number in numbers for row in rows[number * unit : (number + 1) * unit]]


def _sort_key(row: Row) -> bytes:
    return row.inputs.astype(">i4").tobytes()  # big-endian bytes compare as the token sequences do


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


def _new_tokens(rows: Sequence[Row], before: Row | None) -> int:
    """Tokens that the rows add to a prefix tree that holds `before` (at most: each is compared with the last one)."""
    new = 0
    for row in rows:
        new += len(row.inputs) - (_common_prefix(before.inputs, row.inputs) if before else 0)
        before = row
    return new


def largest_unit(rows: Sequence[Row], unit: int) -> int:
    """Computed tokens of the largest unit of neighbouring rows, prefixes shared: the least that must fit in memory."""
    return max(_new_tokens(rows[at : at + unit], None) for at in range(0, len(rows), unit))


def micro_batches(
    rows: Sequence[Row], max_units: int, max_tokens: int | None = None, unit: int = 1
) -> Iterator[list[Row]]:
    """Split a batch into parts of at most `max_units` units and `max_tokens` computed tokens (but at least one unit).

    Rows are sorted first, so that those with a common prefix fall together. How a batch is split does not change its
    gradient.

    Args:
        unit: so many neighbouring rows stay together, in their order.
    """
    part: list[Row] = []
    tokens = 0
    units = [rows[at : at + unit] for at in range(0, len(rows), unit)]
    for together in sorted(units, key=lambda unit_: _sort_key(unit_[0])):
        new = _new_tokens(together, part[-1] if part else None)
        full = len(part) >= max_units * unit
        if part and (full or (max_tokens is not None and tokens + new > max_tokens)):
            yield part
            part, tokens, new = [], 0, _new_tokens(together, None)
        part += together
        tokens += new
    if part:
        yield part


def _cost(units: Iterable[Sequence[Row]], pair_cost: float) -> list[float]:
    """What each unit adds to a prefix tree that holds the one before it, in computed tokens."""
    costs: list[float] = []
    before: Row | None = None
    for unit in units:
        cost = 0.0
        for row in unit:
            length = len(row.inputs)
            new = length - (_common_prefix(before.inputs, row.inputs) if before else 0)
            cost += new + pair_cost * new * (length - (new - 1) / 2)
            before = row
        costs.append(cost)
    return costs


def deal(rows: Sequence[Row], parts: int, unit: int = 1, pair_cost: float = 0.0) -> tuple[list[list[Row]], float]:
    """Deal a batch to workers that compute at the same time, so that the one with the most to compute has little.

    A prefix is computed once by each worker that has a row with it. So neighbours in the order of their tokens are cut
    into parts of about the same cost; where rows differ too much in length for that, the longest are dealt first, each
    to the worker that has least (Graham 1969, doi:10.1137/0117039). The cheaper of both is taken.

    Args:
        parts: workers, at most; a worker without a row is left out.
        unit: so many neighbouring rows stay together, in their order.
        pair_cost: what a query and a key that see each other cost, in computed tokens.

    Returns:
        The rows of each worker, and the cost of the largest part in computed tokens.
    """
    units = sorted((rows[at : at + unit] for at in range(0, len(rows), unit)), key=lambda each: _sort_key(each[0]))
    costs = _cost(units, pair_cost)
    ends = np.cumsum(costs)
    by_place: list[list[int]] = [[] for _ in range(parts)]
    for number, (cost, end) in enumerate(zip(costs, ends, strict=True)):
        by_place[min(parts - 1, int((end - cost / 2) / ends[-1] * parts))].append(number)
    by_length: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for number in sorted(range(len(units)), key=lambda each: -costs[each]):
        least = loads.index(min(loads))
        by_length[least].append(number)
        loads[least] += costs[number]

    def largest_cost(dealt: Sequence[Sequence[int]]) -> float:
        return max(sum(_cost([units[number] for number in sorted(part)], pair_cost)) for part in dealt)

    best = min((by_place, by_length), key=largest_cost)
    return [[row for number in sorted(part) for row in units[number]] for part in best if part], largest_cost(best)


# --------------------------------------------------------------------------- one packed sequence


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes of the tree with one parent and similar length; attention computes them together.

    Attributes:
        start, stop: their tokens are flat[start:stop], one node after another.
        lengths: tokens of each node.
        path: int64 [P], flat indices of all ancestors' tokens, in order; empty for a root.
    """

    start: int
    stop: int
    lengths: tuple[int, ...]
    path: np.ndarray


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A micro-batch as one packed sequence of T tokens, with S predicting positions and N things to predict.

    Attributes:
        ids, positions: int64 [T]; a token's position counts from the start of its own row.
        groups: for attention, covering flat[0:T] in order.
        sources: int64 [S], the flat indices whose logits are needed, ascending.
        entry: int64 [N], index into `sources`, ascending; several rows may predict from one shared position.
        targets: int64 [N], the token to predict there.
        weights: float32 [N].
        owners: int64 [N], which row of the micro-batch (as given) the entry belongs to.
        data_tokens: tokens of the rows in full, whatever is computed.
    """

    ids: np.ndarray
    positions: np.ndarray
    groups: tuple[Group, ...]
    sources: np.ndarray
    entry: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    owners: np.ndarray
    data_tokens: int

    def visible_pairs(self, window: int | None = None) -> int:
        """Queries and keys that see each other, within a sliding window if there is one."""
        pairs = 0
        for group in self.groups:
            for length in group.lengths:
                seen = np.arange(len(group.path) + 1, len(group.path) + length + 1)
                pairs += int(seen.sum() if window is None else np.minimum(seen, window).sum())
        return pairs


@dataclass(slots=True)
class _Node:
    tokens: np.ndarray
    depth: int
    parent: int
    start: int = -1


def _grow(rows: Sequence[np.ndarray], min_shared: int) -> tuple[list[_Node], list[int]]:
    """The prefix tree of sorted token sequences, and the node at which each sequence ends (-1: an empty one)."""
    nodes: list[_Node] = []
    ends = [-1] * len(rows)
    common = [_common_prefix(a, b) for a, b in itertools.pairwise(rows)]
    waiting = [(0, len(rows), 0, -1)]  # rows[low:high] share their first `depth` tokens, which end in node `parent`
    while waiting:
        low, high, depth, parent = waiting.pop()
        first = low
        while first < high:
            last, shared = first + 1, len(rows[first])
            while last < high and common[last - 1] >= depth + min_shared:
                shared = min(shared, common[last - 1])
                last += 1
            here = parent
            if shared > depth:
                here = len(nodes)
                nodes.append(_Node(rows[first][depth:shared], depth, parent))
            if last - first > 1:
                waiting.append((first, last, shared, here))
            if len(rows[first]) == shared:
                ends[first] = here
            first = last
    return nodes, ends


def _similar(lengths: Sequence[int]) -> Iterator[slice]:
    """Cut ascending lengths into runs whose padding, inside attention only, stays under a quarter (or 16 tokens)."""
    first = 0
    total = 0
    for index, length in enumerate(lengths):
        total += length
        if length * (index - first + 1) > max(1.25 * total, total + 16):
            yield slice(first, index)
            first, total = index, length
    yield slice(first, len(lengths))


def _path(nodes: list[_Node], node: int) -> list[int]:
    """The node and its ancestors, root first."""
    chain: list[int] = []
    while node >= 0:
        chain.append(node)
        node = nodes[node].parent
    return chain[::-1]


def _indices(nodes: list[_Node], chain: Sequence[int]) -> np.ndarray:
    parts = [np.arange(nodes[n].start, nodes[n].start + len(nodes[n].tokens)) for n in chain]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _lay_out(nodes: list[_Node]) -> tuple[Group, ...]:
    """Give each node its place in the flat row, children of one parent side by side and by length."""
    children: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(index)
    groups: list[Group] = []
    place = 0
    level = [-1]
    while level:
        following: list[int] = []
        for parent in level:
            family = sorted(children.get(parent, ()), key=lambda n: len(nodes[n].tokens))
            following += family
            for run in _similar([len(nodes[n].tokens) for n in family]) if family else ():
                start = place
                for n in family[run]:
                    nodes[n].start = place
                    place += len(nodes[n].tokens)
                lengths = tuple(len(nodes[n].tokens) for n in family[run])
                groups.append(Group(start, place, lengths, _indices(nodes, _path(nodes, parent))))
        level = following
    return tuple(groups)


def pack(rows: Sequence[Row], *, share: bool = True) -> PackedBatch:
    """Merge rows into one packed sequence.

    Args:
        rows: each with at least one trained token.
        share: False keeps every row whole (plain packing), for tests and for measuring what sharing gives.
    """
    order = sorted(range(len(rows)), key=lambda r: _sort_key(rows[r]))
    inputs = [rows[r].inputs for r in order]
    nodes, ends = _grow(inputs, MIN_SHARED if share else 1 << 30)
    groups = _lay_out(nodes)
    total = sum(len(node.tokens) for node in nodes)
    ids, positions = np.empty(total, np.int64), np.empty(total, np.int64)
    for node in nodes:
        place = slice(node.start, node.start + len(node.tokens))
        ids[place] = node.tokens
        positions[place] = np.arange(node.depth, node.depth + len(node.tokens))
    at: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for sorted_index, row_index in enumerate(order):
        row = rows[row_index]
        predicted = np.flatnonzero(row.weights)
        path = _indices(nodes, _path(nodes, ends[sorted_index]))
        at.append(path[predicted - 1])
        targets.append(row.ids[predicted])
        weights.append(row.weights[predicted])
        owners.append(np.full(len(predicted), row_index))
    flat_at = np.concatenate(at)
    by_place = np.argsort(flat_at, kind="stable")
    sources, entry = np.unique(flat_at[by_place], return_inverse=True)
    return PackedBatch(
        ids=ids,
        positions=positions,
        groups=groups,
        sources=sources.astype(np.int64),
        entry=entry.astype(np.int64),
        targets=np.concatenate(targets)[by_place].astype(np.int64),
        weights=np.concatenate(weights)[by_place].astype(np.float32),
        owners=np.concatenate(owners)[by_place].astype(np.int64),
        data_tokens=sum(len(row.ids) for row in rows),
    )
