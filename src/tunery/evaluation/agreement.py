"""Two models' answers to the same questions: how often they agree, and how good each is by the references."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tunery.evaluation.answers import Answer, Question
from tunery.evaluation.label_reading import NO_LABEL, label_scores, read_label
from tunery.evaluation.scores import text_scores
from tunery.jsonl import JsonObject
from tunery.training.intervals import accuracy_interval

SIDES = ("hosted", "local")

SURE = 0.9
"""A model is sure of an answer whose tokens have this probability on (geometric) average, or more."""


@dataclass(frozen=True)
class Pair:
    """One question and both answers."""

    question: Question
    hosted: Answer
    local: Answer

    def text(self, side: str) -> str:
        """What a side said."""
        return (self.hosted if side == "hosted" else self.local).text.strip()


def compare_sides(pairs: Sequence[Pair], labels: tuple[str, ...], samples: int) -> JsonObject:
    """Agreement of both sides, and the scores of each.

    Args:
        pairs: those that both sides answered with a text.
        labels: where the answers are labels; () elsewhere.

    Returns:
        rows; agreement (exact: the same text but for white space, with its 95 % interval; chrf: overlap of the local
        answers with the hosted ones; label: the same label, where there are labels); with_reference and the scores of
        each side on those; certainty: agreement where the hosted model was sure of its answer and where it was not, if
        its probabilities are known; samples, those that differ first.
    """
    judged = [pair for pair in pairs if pair.question.reference]
    result: JsonObject = {
        "rows": len(pairs),
        "with_reference": len(judged),
        "labels": list(labels),
        "agreement": _agreement(pairs, labels),
    }
    for side in SIDES:
        result[side] = _scores(judged, side, labels) if judged else {}
    if certainty := _by_certainty(pairs):
        result["certainty"] = certainty
    if labels:
        result["between"] = _between(pairs, labels)
    result["samples"] = _samples(pairs, labels, samples)
    return result


def same(a: str, b: str) -> bool:
    """Whether two answers are the same but for white space."""
    return a.split() == b.split()


def _share(hits: Sequence[bool]) -> JsonObject:
    low, high = accuracy_interval(sum(hits), len(hits))
    return {"share": sum(hits) / len(hits), "interval": [low, high], "rows": len(hits)}


def _agreement(pairs: Sequence[Pair], labels: tuple[str, ...]) -> JsonObject:
    texts = {side: [pair.text(side) for pair in pairs] for side in SIDES}
    found: JsonObject = {
        "exact": _share([same(pair.text("hosted"), pair.text("local")) for pair in pairs]),
        "chrf": text_scores(texts["local"], texts["hosted"])["chrf"],
    }
    if labels:
        read = [[read_label(text, labels) for text in texts[side]] for side in SIDES]
        found["label"] = _share([a is not None and a == b for a, b in zip(*read, strict=True)])
    return found


def _scores(pairs: Sequence[Pair], side: str, labels: tuple[str, ...]) -> JsonObject:
    texts, references = [pair.text(side) for pair in pairs], [pair.question.reference for pair in pairs]
    exact = _share([same(text, reference) for text, reference in zip(texts, references, strict=True)])
    found: JsonObject = {"exact": exact["share"], "exact_interval": exact["interval"]}
    if not labels:
        return {**found, **text_scores(texts, references)}
    known = [i for i, reference in enumerate(references) if reference.strip() in labels]
    read = [read_label(texts[i], labels) for i in known]
    shown = labels if None not in read else (*labels, NO_LABEL)
    return {**found, **(label_scores([references[i].strip() for i in known], read, shown) if known else {})}


def _by_certainty(pairs: Sequence[Pair]) -> list[JsonObject]:
    known = [(pair, sure) for pair in pairs if (sure := certainty(pair.hosted)) is not None]
    groups = (
        (f"the hosted model was sure (tokens of {SURE:.0%} probability or more)", [p for p, s in known if s >= SURE]),
        ("it was less sure", [p for p, s in known if s < SURE]),
    )
    return [
        {"name": name, **_share([same(pair.text("hosted"), pair.text("local")) for pair in group])}
        for name, group in groups
        if group
    ]


def certainty(answer: Answer) -> float | None:
    """The geometric mean of the probabilities of an answer's tokens; None where they are not known."""
    if not answer.logprobs:
        return None
    return math.exp(statistics.fmean(value for _, value in answer.logprobs))


def _between(pairs: Sequence[Pair], labels: tuple[str, ...]) -> JsonObject:
    """How often the hosted model's label (line) met each of the local one's (column)."""
    names = [*labels, NO_LABEL]
    counts = [[0] * len(names) for _ in names]
    for pair in pairs:
        line, column = (names.index(read_label(pair.text(side), labels) or NO_LABEL) for side in SIDES)
        counts[line][column] += 1
    if not any(counts[-1]) and not any(line[-1] for line in counts):
        names, counts = names[:-1], [line[:-1] for line in counts[:-1]]
    return {"labels": names, "counts": counts}


def _samples(pairs: Sequence[Pair], labels: tuple[str, ...], wanted: int) -> list[JsonObject]:
    def agree(pair: Pair) -> bool:
        if labels:
            return read_label(pair.text("hosted"), labels) == read_label(pair.text("local"), labels)
        return same(pair.text("hosted"), pair.text("local"))

    apart, alike = ([pair for pair in pairs if agree(pair) is wanted_] for wanted_ in (False, True))
    chosen = apart[: max(wanted - len(alike), math.ceil(0.75 * wanted))]
    chosen += alike[: wanted - len(chosen)]
    return [
        {
            "where": pair.question.where,
            "prompt": pair.question.shown,
            "reference": pair.question.reference,
            "hosted": pair.text("hosted"),
            "local": pair.text("local"),
            "agree": agree(pair),
        }
        for pair in chosen
    ]
