"""Which rows are held out. The same text is never on both sides.

What counts as the same is the input of a row (`text_key`): a review that stands in the file twice, even with two
labels, is one text. Rows of one text move together. The draw depends on the seed and on the set of texts, not on the
order of the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from tunery.data.example import Example
from tunery.data.kinds import KINDS
from tunery.errors import ConfigError

_HOLD_OUT, _DRAW, _SHUFFLE = range(3)  # one stream of random numbers each, all from the one seed


def text_key(example: Example) -> str:
    """The input of a row, with case and spacing removed: its text, its prompt, or all that its user says.

    A row without input (an empty prompt, a conversation without user) goes by its answer.
    """
    said, answer = KINDS[example.kind].key(example)
    return " ".join((said if said.strip() else answer).casefold().split())


def content_key(example: Example) -> bytes:
    """A hash of all content of a row, answer included, exactly."""
    parts = (example.text, example.label, example.prompt, example.completion, example.messages, example.tools)
    content = json.dumps((*parts, example.chosen, example.rejected), sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def without_duplicates(rows: Iterable[Example]) -> tuple[list[Example], int]:
    """(rows without those whose whole content repeats an earlier one, how many repeat)."""
    first: dict[bytes, Example] = {}
    count = 0
    for row in rows:
        count += 1
        first.setdefault(content_key(row), row)
    return list(first.values()), count - len(first)


def without_texts(rows: Sequence[Example], held_out: Iterable[Example]) -> list[Example]:
    """The rows whose text is not among those held out."""
    taken = {text_key(row) for row in held_out}
    return [row for row in rows if text_key(row) not in taken] if taken else list(rows)


def shuffled(rows: Sequence[Example], seed: int) -> list[Example]:
    """The rows in an order drawn with the seed, so that the first of them are a fair sample of a sorted file."""
    order = np.random.default_rng([seed, _SHUFFLE]).permutation(len(rows))
    return [rows[index] for index in order]


def draw(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` of the rows, drawn with the seed, in the order they had. All of them when there are no more."""
    if count >= len(rows):
        return list(rows)
    chosen = np.random.default_rng([seed, _DRAW]).choice(len(rows), count, replace=False)
    return [rows[index] for index in np.sort(chosen)]


def hold_out(rows: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split off rows for validation: (rows to train on, in their order; rows held out, in random order).

    Each label gets its part of the held-out rows, as nearly as whole texts allow (largest remainder method). No more
    rows than wanted are held out, unless the smallest text has more; a single text is not split.

    Args:
        share: below 1 a fraction of the rows (at least one row), else a number of rows.

    Raises:
        ConfigError: a number of rows that leaves none to train on, or that one text makes impossible.
    """
    wanted = _wanted(share, len(rows))
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(text_key(row), []).append(index)
    if len(groups) < 2:
        if share >= 1:
            raise ConfigError(
                f"data.validation asks for {wanted} rows, but all rows have the same text or prompt",
                "name a file in data.validation, or set it to null",
            )
        return list(rows), []
    keys = sorted(groups)
    places: list[int] = np.random.default_rng([seed, _HOLD_OUT]).permutation(len(keys)).tolist()
    order = [keys[place] for place in places]
    labels = {key: min(rows[index].label for index in groups[key]) for key in order}
    taken = _take(order, {key: len(groups[key]) for key in order}, labels, wanted)
    held = [index for key in order if key in taken for index in groups[key]]
    inside = set(held)
    return [row for index, row in enumerate(rows) if index not in inside], [rows[index] for index in held]


def _wanted(share: float, rows: int) -> int:
    if share >= 1:
        if share >= rows:
            raise ConfigError(
                f"data.validation asks for {int(share)} rows, but there are only {rows} in all",
                "ask for fewer, or give a fraction such as 0.1",
            )
        return int(share)
    return min(max(1, round(rows * share)), rows - 1)


def _quotas(sizes: Counter[str], wanted: int) -> dict[str, int]:
    """Share `wanted` among the labels by their sizes: whole parts first, then the largest remainders."""
    total = sum(sizes.values())
    quotas = {label: wanted * size // total for label, size in sizes.items()}
    remainders = sorted(sizes, key=lambda label: (-(wanted * sizes[label] % total), label))
    for label in remainders[: wanted - sum(quotas.values())]:
        quotas[label] += 1
    return quotas


def _take(order: Sequence[str], sizes: dict[str, int], labels: dict[str, str], wanted: int) -> set[str]:
    """Texts, in their order, that fit first their label's quota, then what is left of the whole."""
    by_label: Counter[str] = Counter()
    for key in order:
        by_label[labels[key]] += sizes[key]
    left = _quotas(by_label, wanted)
    taken: set[str] = set()
    for key in order:
        if sizes[key] <= left[labels[key]]:
            left[labels[key]] -= sizes[key]
            taken.add(key)
    rest = sum(left.values())
    for key in order:
        if rest and key not in taken and sizes[key] <= rest:
            rest -= sizes[key]
            taken.add(key)
    return taken or {min(order, key=lambda key: sizes[key])}
