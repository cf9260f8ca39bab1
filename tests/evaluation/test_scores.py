"""Scores against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunery.data.batching import Row
from tunery.errors import DataError
from tunery.evaluation.scores import classification_scores, text_scores
from tunery.training.intervals import accuracy_interval
from tunery.training.objectives.dpo import preference_scores


def test_scores_of_a_small_confusion():
    scores = classification_scores([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0], ["a", "b", "c"])
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["confusion"] == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert scores["per_label"]["a"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert scores["per_label"]["b"] == pytest.approx({"precision": 2 / 3, "recall": 1, "f1": 0.8, "support": 2})
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0.8 + 0) / 3)
    assert scores["weighted_f1"] == pytest.approx((3 * 2 / 3 + 2 * 0.8) / 6)


def test_a_label_never_predicted_scores_zero_not_nan():
    scores = classification_scores([0, 1], [0, 0], ["a", "b"])
    assert scores["per_label"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_a_label_that_never_occurs_does_not_drag_the_macro_average():
    assert classification_scores([0, 1], [0, 1], ["a", "b", "unused"])["macro_f1"] == 1.0


def test_no_rows_is_an_error_in_words():
    with pytest.raises(DataError, match="no rows"):
        classification_scores([], [], ["a"])
    with pytest.raises(DataError, match="no answers"):
        text_scores([], [])
    with pytest.raises(DataError, match="no rows"):
        accuracy_interval(0, 0)


@pytest.mark.parametrize(("truth", "predicted"), [([0], []), ([0], [2]), ([-1], [0])])
def test_labels_that_do_not_fit_are_refused(truth: list[int], predicted: list[int]):
    with pytest.raises(ValueError, match="label"):
        classification_scores(truth, predicted, ["a", "b"])


def test_interval_matches_published_values():
    # Newcombe 1998 (Statistics in Medicine 17:857-872), table I, method 3: 81/263, 15/148, 0/20, 1/29
    assert accuracy_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert accuracy_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert accuracy_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert accuracy_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_interval_is_symmetric_and_ends_at_one():
    low, high = accuracy_interval(20, 20)
    assert high == 1.0
    assert low == pytest.approx(1 - accuracy_interval(0, 20)[1])


def test_an_answer_equal_to_its_reference_scores_a_hundred():
    scores = text_scores(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert scores["chrf"] == pytest.approx(100)
    assert scores["bleu"] == pytest.approx(100)


def test_distinct_counts_over_all_answers_and_divides_by_words():
    scores = text_scores(["a b a", "a b"], ["x", "y"])
    assert scores["distinct_1"] == pytest.approx(2 / 5)
    assert scores["distinct_2"] == pytest.approx(2 / 5)  # ab, ba
    assert scores["mean_words"] == pytest.approx(2.5)


def test_empty_answers_score_zero():
    assert text_scores(["", " "], ["hello there", "you"]) == {
        "chrf": 0.0,
        "bleu": 0.0,
        "distinct_1": 0.0,
        "distinct_2": 0.0,
        "mean_words": 0.0,
    }


def test_pairs_are_judged_by_whole_answers_and_by_rewards_against_the_base() -> None:
    def row(trained: int) -> Row:
        return Row(np.arange(6, dtype=np.int32), np.r_[np.zeros(6 - trained), np.ones(trained)].astype(np.float32))

    rows = [row(2), row(4), row(2), row(4)]  # chosen, rejected, chosen, rejected
    base = np.array([-4.0, -3.0, -2.0, -9.0])
    tuned = np.array([-3.0, -5.0, -4.0, -10.0])
    before, after = (preference_scores(scores, base, rows, 0.5) for scores in (base, tuned))
    assert before["preference_accuracy"] == 0.5
    assert after["preference_accuracy"] == 1.0
    assert after["rewards_accuracy"] == 0.5  # the second pair's preferred answer lost 2, its rejected one only 1
    assert after["rewards_margin"] == pytest.approx(0.5 * ((1 + 2) + (-2 + 1)) / 2)
    assert before["preference_loss"] == pytest.approx(math.log(2))
    assert after["loss"] == pytest.approx(7 / 4)  # a token, over both preferred answers
    assert after["rejected_loss"] == pytest.approx(15 / 8)
