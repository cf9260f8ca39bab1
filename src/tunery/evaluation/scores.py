"""Scores from answers and labels. Pure functions; no model is needed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tunery.errors import DataError
from tunery.jsonl import JsonObject
from tunery.training.intervals import accuracy_interval


def classification_scores(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> JsonObject:
    """Accuracy, precision, recall and F1 of a classifier.

    Args:
        truth: index into `labels` of the right label, one per row.
        predicted: index of the label the model chose, one per row.
        labels: the label names.

    Returns:
        accuracy; accuracy_interval ([low, high], 95 %); macro_f1 and weighted_f1 (mean F1 over the labels that occur in
        `truth` or `predicted`, plain and weighted by support); per_label (name → precision, recall, f1, support: a
        ratio with nothing below the line is 0); confusion (rows: truth, columns: predicted).

    Raises:
        DataError: no rows.
        ValueError: lengths differ, or an index has no label.
    """
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} true labels but {len(predicted)} predicted ones")
    if not truth:
        raise DataError("no rows to score", "give held-out rows with data.validation, data.test or --data")
    size = len(labels)
    if any(not 0 <= index < size for index in (*truth, *predicted)):
        raise ValueError(f"a label index is outside 0…{size - 1}")
    confusion = [[0] * size for _ in labels]
    for right, chosen in zip(truth, predicted, strict=True):
        confusion[right][chosen] += 1
    per_label = {name: _label_scores(confusion, index) for index, name in enumerate(labels)}
    seen = set(truth) | set(predicted)
    occurring = [scores for index, scores in enumerate(per_label.values()) if index in seen]
    correct = sum(confusion[index][index] for index in range(size))
    return {
        "accuracy": correct / len(truth),
        "accuracy_interval": list(accuracy_interval(correct, len(truth))),
        "macro_f1": sum(scores["f1"] for scores in occurring) / len(occurring),
        "weighted_f1": sum(scores["f1"] * scores["support"] for scores in occurring) / len(truth),
        "per_label": per_label,
        "confusion": confusion,
    }


def _label_scores(confusion: list[list[int]], index: int) -> dict[str, float]:
    hits = confusion[index][index]
    support = sum(confusion[index])
    chosen = sum(row[index] for row in confusion)
    return {
        "precision": hits / chosen if chosen else 0.0,
        "recall": hits / support if support else 0.0,
        "f1": 2 * hits / (support + chosen) if support + chosen else 0.0,
        "support": support,
    }


def text_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How close generated answers are to their references, and how varied they are.

    Args:
        answers: what the model wrote.
        references: what stands in the data, one for each answer.

    Returns:
        chrf (Popović 2015) and bleu (Papineni et al. 2002), over all rows together, 0 to 100, as sacrebleu computes
        them with its defaults; distinct_1 and distinct_2: different words, and pairs of neighbouring words, divided by
        all words written (Li et al. 2016, arXiv:1510.03055; words are split at white space); mean_words of an answer.

    Raises:
        DataError: no rows.
        ValueError: lengths differ.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers but {len(references)} references")
    if not answers:
        raise DataError("no answers to score", "set evaluate.generate_rows above 0")
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    words = [answer.split() for answer in answers]
    return {
        "chrf": CHRF().corpus_score(answers, [references]).score,
        "bleu": BLEU().corpus_score(answers, [references]).score,
        "distinct_1": _distinct(words, 1),
        "distinct_2": _distinct(words, 2),
        "mean_words": sum(map(len, words)) / len(words),
    }


def _distinct(answers: Iterable[Sequence[str]], size: int) -> float:
    grams: set[tuple[str, ...]] = set()
    total = 0
    for words in answers:
        total += len(words)
        grams.update(tuple(words[start : start + size]) for start in range(len(words) - size + 1))
    return len(grams) / total if total else 0.0
