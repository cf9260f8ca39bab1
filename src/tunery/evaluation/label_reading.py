"""Labels read from what a model wrote, how often they are right, and whether a set of answers is one of labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from tunery.evaluation.scores import classification_scores
from tunery.jsonl import JsonObject

NO_LABEL = "(none of them)"
"""Stands for answers that give no label, or several."""


def read_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer gives: the answer is that label, or names it and no other; else None.

    Case, and punctuation and white space around, do not count, unless labels differ in these only.
    """
    if answer.strip() in labels:
        return answer.strip()
    bare = answer.strip().strip(".,;:!?\"'`*()[] \n\t").casefold()
    exact = [label for label in labels if label.casefold() == bare]
    if exact:
        return exact[0]
    named = [label for label in labels if re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", answer.casefold())]
    # a label that is part of another one named ("good" in "very good") is not named by itself
    whole = [one for one in named if not any(one != other and one.casefold() in other.casefold() for other in named)]
    return whole[0] if len(whole) == 1 else None


def label_scores(truth: Sequence[str], read: Sequence[str | None], labels: Sequence[str]) -> JsonObject:
    """As tunery.evaluation.scores.classification_scores, for labels read from answers.

    Args:
        read: the label of each answer; None counts as wrong, under NO_LABEL, which `labels` then ends with.
    """
    numbers = {label: index for index, label in enumerate(labels)}
    scores = classification_scores(
        [numbers[label] for label in truth], [numbers[label or NO_LABEL] for label in read], labels
    )
    real = [label for label in labels if label != NO_LABEL]
    occurring = [scores["per_label"][label]["f1"] for label in real if label in {*truth, *read}]
    return {**scores, "macro_f1": sum(occurring) / len(occurring), "unlabelled": sum(label is None for label in read)}


def common_labels(references: Iterable[str]) -> tuple[str, ...]:
    """The labels, where the answers of a set of rows are a few short texts again and again; else none.

    At most 20 different ones of up to 40 characters, five times each on average, and none only once.
    """
    counts = Counter(reference.strip() for reference in references)
    total = sum(counts.values())
    few = 2 <= len(counts) <= 20 and total >= 5 * len(counts)
    short = all(0 < len(label) <= 40 and "\n" not in label for label in counts)
    if not few or not short or any(count < 2 for count in counts.values()):
        return ()
    return tuple(sorted(counts))
