"""Who sees whom in a packed sequence, in O(T) numbers, and the pattern of blocks that a block-sparse kernel needs.

A token sees the tokens of its node's ancestors and, causally, those of its own node. With the nodes of the prefix tree
numbered in preorder, "ancestor or itself" is a comparison of three numbers, and positions do the rest:

    sees(query, key) = enter[key] <= enter[query] < end[key]  and  0 <= position[query] - position[key] < window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunery.data.batching import Group
from tunery.fast.attention_rule import Array, in_reach

NOWHERE = -1
"""`enter` and `end` of padding: it sees nothing, and nothing sees it."""

_PAIRS = 1 << 22
"""Pairs of segments compared at once: a few dozen MB of temporary arrays at most."""


@dataclass(frozen=True)
class Tree:
    """Where each token of a packed sequence stands in the prefix tree.

    Attributes:
        enter: int32 [T], number of the token's node in preorder; a node's descendants follow it.
        end: int32 [T], one more than the largest number among the node and its descendants.
        position: int32 [T], counted from the start of the token's own row.
    """

    enter: np.ndarray
    end: np.ndarray
    position: np.ndarray

    def padded(self, length: int) -> Tree:
        """The same with tokens at the end that neither see nor are seen, up to `length` tokens."""
        missing = length - len(self.enter)
        enter, end = (np.pad(x, (0, missing), constant_values=NOWHERE) for x in (self.enter, self.end))
        return Tree(enter, end, np.pad(self.position, (0, missing)))

    def sees(self, window: int | None) -> np.ndarray:
        """The whole mask, bool [T, T], by the formula above; for tests and small rows."""
        query, key = (slice(None), None), (None, slice(None))
        return sees(
            (self.enter[query], self.position[query]),
            (self.enter[key], self.end[key], self.position[key]),
            window,
        )


def sees(query: tuple[Array, Array], key: tuple[Array, Array, Array], window: int | Array | None) -> Array:
    """Which queries see which keys, by the formula above.

    Args:
        query: their `enter` and `position`.
        key: their `enter`, `end` and `position`, of shapes that broadcast with those.
    """
    (number, at), (enter, end, position) = query, key
    return (enter <= number) & (number < end) & in_reach(at, position, window)


def tree_of(groups: Sequence[Group]) -> Tree:
    """Number the nodes of a packed sequence. Groups come with parents before children, as `pack` lays them out."""
    total = groups[-1].stop if groups else 0
    node_of = np.empty(total, np.int64)
    position = np.empty(total, np.int32)
    lengths: list[int] = []
    parents: list[int] = []
    for group in groups:
        parent, place = int(node_of[group.path[-1]]) if len(group.path) else -1, group.start
        for length in group.lengths:
            node_of[place : place + length] = len(lengths)
            position[place : place + length] = np.arange(len(group.path), len(group.path) + length)
            lengths.append(length)
            parents.append(parent)
            place += length
    enter, end = _preorder(parents)
    return Tree(enter[node_of], end[node_of], position)


def _preorder(parents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(number of each node in preorder, one past its last descendant), int32; parents stand before their children."""
    count = len(parents)
    sizes = [1] * count
    for node in range(count - 1, -1, -1):
        if parents[node] >= 0:
            sizes[parents[node]] += sizes[node]
    free, root = [0] * count, 0  # the next number to give below each node
    enter = np.empty(count, np.int32)
    for node, parent in enumerate(parents):
        number = root if parent < 0 else free[parent]
        enter[node], free[node] = number, number + 1
        if parent < 0:
            root += sizes[node]
        else:
            free[parent] += sizes[node]
    return enter, enter + np.asarray(sizes, np.int32)


def block_pattern(tree: Tree, window: int | None, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of block x block scores hold some visible pair, and which hold nothing else.

    Returns:
        (partial, full), each bool [ceil(T / block), ceil(T / block)], queries in rows. No T x T array is made: within a
        block, a run of tokens of one node (a segment) stands for all of them, since its positions are consecutive.
    """
    total = len(tree.enter)
    new = np.arange(total) % block == 0
    new[1:] |= tree.enter[1:] != tree.enter[:-1]
    first = np.flatnonzero(new)
    last = np.append(first[1:], total) - 1
    enter, end = tree.enter[first], tree.end[first]
    low, high = tree.position[first], tree.position[last]
    edges = np.searchsorted(first, np.arange(0, total, block))
    some, every = [], []
    step = max(1, _PAIRS // len(first))
    for at in range(0, len(first), step):
        part = slice(at, at + step)
        related = (enter[None, :] <= enter[part, None]) & (enter[part, None] < end[None, :])
        nearest, farthest = low[part, None] - high[None, :], high[part, None] - low[None, :]
        seen, all_seen = related & (farthest >= 0), related & (nearest >= 0)
        if window is not None:
            seen &= nearest < window
            all_seen &= farthest < window
        some.append(np.logical_or.reduceat(seen, edges, axis=1))
        every.append(np.logical_and.reduceat(all_seen, edges, axis=1))
    touched = np.logical_or.reduceat(np.concatenate(some), edges, axis=0)
    full = np.logical_and.reduceat(np.concatenate(every), edges, axis=0)
    if total % block:  # what lies beyond the row is not visible
        full[-1] = full[:, -1] = False
    return touched & ~full, full
