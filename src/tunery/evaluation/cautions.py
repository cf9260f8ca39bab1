"""What to know before trusting a comparison of base and tuned model: sentences from evaluation.json."""

from __future__ import annotations

from collections.abc import Iterator

from tunery.evaluation.record import as_number, interval_of, items, listed, pick, unit_of
from tunery.jsonl import JsonMapping
from tunery.text import plural, some_of

FEW = 30
"""Below so many held-out rows a mean says little, whatever it is a mean of."""

LISTED = 8


def cautions(evaluation: JsonMapping) -> list[str]:
    """Each a sentence without its full stop; [] where nothing is in the way, or there is no evaluation."""
    if not evaluation:
        return []
    return [*_few_rows(evaluation), *_labels(evaluation), *_contradictions(evaluation)]


def baseline(evaluation: JsonMapping) -> tuple[str, float] | None:
    """(label, fraction): how often it would be right to answer every held-out row with the most frequent label; None
    where that is not known."""
    counts = {label: as_number(pick(scores, "support")) or 0 for label, scores in _per_label(evaluation)}
    if not sum(counts.values()):
        return None
    most = max(counts, key=counts.__getitem__)
    return most, counts[most] / sum(counts.values())


def _per_label(evaluation: JsonMapping) -> list[tuple[str, JsonMapping]]:
    return items(pick(evaluation, "tuned", "per_label"))


def _few_rows(evaluation: JsonMapping) -> Iterator[str]:
    rows, unit = as_number(pick(evaluation, "rows")), unit_of(evaluation)[:-1]
    if rows is None or rows >= FEW:
        return
    if rows == 1:
        yield f"one held-out {unit} only: the figures are about that {unit} and say nothing about others"
        return
    said = f"{plural(int(rows), f'held-out {unit}')} only: the figures could be quite different on others"
    if range_ := interval_of(evaluation, "tuned"):
        said += f" (tuned: {range_[0]:.0%} here, between {range_[1]:.0%} and {range_[2]:.0%} with 95 % confidence)"
    yield said


def _labels(evaluation: JsonMapping) -> Iterator[str]:
    scores = _per_label(evaluation)
    confusion = [
        [as_number(count) or 0 for count in listed(row)] for row in listed(pick(evaluation, "tuned", "confusion"))
    ]
    tuned, common = interval_of(evaluation, "tuned"), baseline(evaluation)
    if tuned and common and tuned[1] <= common[1]:
        word = "no more often" if tuned[0] <= common[1] else "not surely more often"
        yield (
            f"the tuned model is right {word} than answering {common[0]} every time would be "
            f"({common[1]:.1%} of these rows)"
        )
    supports = {label: as_number(pick(score, "support")) or 0 for label, score in scores}
    if len(confusion) >= len(supports):
        never = [
            label for at, label in enumerate(supports) if supports[label] and not sum(row[at] for row in confusion)
        ]
        if never:
            yield f"labels that the tuned model never gives: {some_of(never, LISTED)}"
    absent = [label for label, support in supports.items() if not support]
    if absent:
        yield f"labels of which no row was held out, so nothing is known about them: {some_of(absent, LISTED)}"


def _contradictions(evaluation: JsonMapping) -> Iterator[str]:
    """Two figures of the same rows that say the opposite."""
    loss = _change(evaluation, "loss")
    for key, name in (("accuracy", "accuracy"), ("token_accuracy", "token accuracy"), ("chrf", "overlap (chrF)")):
        change = _change(evaluation, key)
        if loss is None or change is None or loss * change <= 0:
            continue  # a loss that falls while a score rises is no contradiction
        if change > 0:
            yield f"the {name} rose, and so did the loss: right more often, and surer where it is wrong"
        else:
            yield f"the loss fell, and so did the {name}: closer to the data on average, and right less often"
        return


def _change(evaluation: JsonMapping, key: str) -> float | None:
    base, tuned = (as_number(pick(evaluation, side, key)) for side in ("base", "tuned"))
    return None if base is None or tuned is None else tuned - base
