"""What a comparison does not tell, said wherever it is shown."""

from __future__ import annotations

from typing import Any

import pytest

from tunery.evaluation.cautions import baseline, cautions
from tunery.evaluation.record import headline, metric_rows
from tunery.evaluation.scores import classification_scores

LABELS = ["good", "bad", "odd"]


def judged(truth: list[int], base: list[int], tuned: list[int], **losses: float) -> dict[str, Any]:
    """evaluation.json of a classification, as far as it is read here."""
    sides = {"base": base, "tuned": tuned}
    return {
        "kind": "classification",
        "rows": len(truth),
        "labels": LABELS,
        **{
            side: {**classification_scores(truth, said, LABELS), "loss": losses.get(side, 1.0)}
            for side, said in sides.items()
        },
    }


def test_one_row_and_few_rows_are_named_with_their_interval() -> None:
    one = cautions(judged([0], [1], [0]))
    assert one[0].startswith("one held-out row only")
    few = cautions(judged([0] * 5 + [1] * 5, [0] * 10, [0] * 5 + [1] * 3 + [0] * 2))
    assert few[0] == (
        "10 held-out rows only: the figures could be quite different on others "
        "(tuned: 80% here, between 49% and 94% with 95 % confidence)"
    )
    assert "base 24% to 76%, tuned 49% to 94%" in headline(
        judged([0] * 5 + [1] * 5, [0] * 10, [0] * 5 + [1] * 3 + [0] * 2)
    )


def test_the_most_frequent_label_is_a_baseline_that_must_be_beaten() -> None:
    truth = [0] * 80 + [1] * 20
    lazy = judged(truth, [1] * 100, [0] * 100)
    assert baseline(lazy) == ("good", 0.8)
    said = " | ".join(cautions(lazy))
    assert "no more often than answering good every time would be (80.0% of these rows)" in said
    assert "labels that the tuned model never gives: bad" in said
    assert "labels of which no row was held out, so nothing is known about them: odd" in said
    better = cautions(judged(truth, [0] * 100, truth))
    assert better == ["labels of which no row was held out, so nothing is known about them: odd"]


@pytest.mark.parametrize(
    ("base", "tuned", "words"),
    [
        ((0.6, 1.0), (0.8, 2.0), "the accuracy rose, and so did the loss"),
        ((0.8, 2.0), (0.6, 1.0), "the loss fell, and so did the accuracy"),
        ((0.6, 2.0), (0.8, 1.0), None),
    ],
)
def test_figures_that_contradict_each_other_are_named(
    base: tuple[float, float], tuned: tuple[float, float], words: str | None
) -> None:
    sides = {side: {"accuracy": a, "loss": b} for side, (a, b) in (("base", base), ("tuned", tuned))}
    said = cautions({"kind": "classification", "rows": 400, **sides})
    assert [sentence.startswith(words or "-") for sentence in said] == ([True] if words else [])


def test_nothing_is_said_of_no_evaluation() -> None:
    assert cautions({}) == []
    assert baseline({}) is None


def test_a_perplexity_without_meaning_is_capped() -> None:
    evaluation = {"kind": "text", "base": {"perplexity": 43370003423619.328}, "tuned": {"perplexity": 12.5}}
    (row,) = metric_rows(evaluation)
    assert (row.base, row.tuned, row.change, row.verdict) == ("over 1,000", "12.50", "", "better")
