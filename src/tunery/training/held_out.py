"""What the split of a data set allows to be learnt and known, in sentences, before any compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tunery.data.example import DataSet, Example
from tunery.data.kinds import KINDS
from tunery.text import plural, some_of
from tunery.training.intervals import accuracy_interval

FEW_HELD_OUT = 30
"""Below so many held-out rows an accuracy is uncertain by 18 points and more, either way."""

FEW_OF_A_LABEL = 5
LISTED = 8


def split_remarks(data: DataSet) -> list[str]:
    """Few held-out rows, labels with few rows or none on one side, and training rows that contradict each other."""
    split, held_out = data.held_out
    found = [*_held_out(split, len(held_out)), *_labels(data.labels, data.train, held_out)]
    return [*found, *KINDS[data.kind].remarks(data.train)]


def _held_out(split: str, rows: int) -> Iterator[str]:
    if rows == 0:
        yield "no row is held out for validation: nothing will tell whether the training helps on other rows"
    elif rows == 1:
        yield f"one {split} row is held out: that tells nothing about others"
    elif rows < FEW_HELD_OUT:
        low, high = accuracy_interval(rows // 2, rows)
        yield (
            f"{plural(rows, f'{split} row')} are held out: a share measured on so few is uncertain by about "
            f"{(high - low) * 50:.0f} points either way"
        )


def _labels(labels: Iterable[str], train: Iterable[Example], held_out: list[Example]) -> Iterator[str]:
    trained, kept = (Counter(example.label for example in rows) for rows in (train, held_out))
    unseen = [label for label in labels if not trained[label]]
    if unseen:
        yield f"labels without a training row, which cannot be learnt: {some_of(unseen, LISTED)}"
    few = [f"{label} ({trained[label]})" for label in labels if 0 < trained[label] < FEW_OF_A_LABEL]
    if few:
        yield f"labels with few training rows: {some_of(few, LISTED)}"
    unknown = [label for label in labels if not kept[label]] if held_out else []
    if unknown:
        yield f"labels without a held-out row, of which nothing will be known: {some_of(unknown, LISTED)}"
