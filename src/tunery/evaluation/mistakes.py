"""Held-out rows that the tuned model gets wrong, the surest first: what a person reads to see why."""

from __future__ import annotations

from dataclasses import dataclass

from tunery.evaluation.record import RunRecord, as_number, compares_answers, listed, pick, show
from tunery.jsonl import JsonMapping

SHOWN = 50
"""In the report; predictions.jsonl has all."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """A row that the tuned model gets wrong.

    Attributes:
        where, asked, right, said: the row's place, what was given, the right answer, and the tuned model's.
        sure: how sure the model is, in words; "" where it does not say.
        base: what the base says.
    """

    where: str
    asked: str
    right: str
    said: str
    sure: str
    base: str


def mistakes(record: RunRecord) -> list[Mistake]:
    """All of them, the surest first; none where answers are neither labels nor pairs.

    Of a label it is the probability that tells how sure the model is; of a pair, how much likelier it finds the
    rejected answer than the preferred one.
    """
    if listed(pick(record.evaluation, "labels")):
        wrong = [line for line in record.predictions if line.get("tuned") not in (None, line.get("expected"))]
        surest = sorted(wrong, key=lambda line: -(as_number(line.get("tuned_probability")) or 0.0))
        return [_wrong_label(line) for line in surest]
    if compares_answers(record.evaluation):
        leanings = [(_leaning(line), line) for line in record.predictions]
        wrong_pairs = [(leaning, line) for leaning, line in leanings if leaning is not None and leaning >= 0]
        return [_wrong_pair(leaning, line) for leaning, line in sorted(wrong_pairs, key=lambda pair: -pair[0])]
    return []


def _leaning(line: JsonMapping) -> float | None:
    """How much likelier the tuned model finds the rejected answer, in nats."""
    chosen, rejected = (as_number(line.get(f"tuned_{which}log_probability")) for which in ("", "rejected_"))
    return None if chosen is None or rejected is None else rejected - chosen


def _wrong_label(line: JsonMapping) -> Mistake:
    said, base = (_with_share(line, side) for side in ("tuned", "base"))
    text = {key: str(line.get(key) or "") for key in ("where", "input", "expected", "tuned")}
    return Mistake(text["where"], text["input"], text["expected"], text["tuned"], said, base)


def _with_share(line: JsonMapping, side: str) -> str:
    share = as_number(line.get(f"{side}_probability"))
    said = show(line.get(side), "words")
    return said if share is None else f"{said} ({share:.1%})"


def _wrong_pair(leaning: float, line: JsonMapping) -> Mistake:
    text = {key: str(line.get(key) or "") for key in ("where", "input", "expected", "rejected")}
    sure = f"{leaning:.1f} nats likelier"
    return Mistake(text["where"], text["input"], text["expected"], text["rejected"], sure, "")
