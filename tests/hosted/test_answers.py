"""Held-out rows as questions, and what their answers say."""

from __future__ import annotations

import pytest

from tunery.data.example import Example, Place
from tunery.data.prompts import Prompts
from tunery.evaluation.answers import Question, questions
from tunery.evaluation.label_reading import NO_LABEL, label_scores, read_label

LABELS = ("good", "very good", "bad", "how-to")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("good", "good"),
        (" Good.\n", "good"),
        ('"bad"', "bad"),
        ("**how-to**", "how-to"),
        ("The answer is: bad", "bad"),
        ("It is very good", "very good"),
        ("very good", "very good"),
        ("good or bad", None),
        ("goodness", None),
        ("", None),
        ("no idea", None),
    ],
)
def test_a_label_is_read_from_an_answer_that_gives_just_one(answer: str, label: str | None) -> None:
    assert read_label(answer, LABELS) == label


def test_answers_without_a_label_are_wrong_and_counted() -> None:
    scores = label_scores(["a", "b", "b", "a"], ["a", "b", None, "b"], ("a", "b", NO_LABEL))
    assert scores["accuracy"] == 0.5
    assert scores["unlabelled"] == 1
    assert scores["confusion"] == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0.5) / 2)


def test_a_question_ends_where_the_answer_begins() -> None:
    wording = Prompts(labels=("a", "b"), instruction="a or b?", system="be brief")
    chat = (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "weight": 0},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "so long"},
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    asked, left_out = questions(
        [
            Example("classification", Place("f", 1), text="t", label="a"),
            Example("chat", Place("f", 2), messages=chat),
            Example("completion", Place("f", 3), prompt="p", completion="c"),
            Example("preference", Place("f", 4), messages=chat[:1], chosen=(chat[1],), rejected=(chat[3],)),
            Example("chat", Place("f", 5), messages=(chat[0], call)),
        ],
        wording,
    )
    system = {"role": "system", "content": "be brief"}
    assert left_out == 1
    assert [question.reference for question in asked] == ["a", "so long", "c", "hello"]
    assert asked[0].messages == (system, {"role": "user", "content": "a or b?\n\nt"})
    assert asked[0].shown == "t"
    assert asked[1].messages == (system, chat[0], {"role": "assistant", "content": "hello"}, chat[2])
    assert asked[2].messages == (system, {"role": "user", "content": "p"})
    assert (asked[3].messages, asked[3].rejected) == ((system, chat[0]), "so long")


def test_labels_that_differ_in_case_are_told_apart_where_the_answer_is_one() -> None:
    assert read_label("good", ("Good", "good")) == "good"
    assert read_label(" C++\n", ("C", "C++")) == "C++"


def test_the_same_question_has_the_same_key() -> None:
    one = Question("f:1", ({"role": "user", "content": "hi"},), reference="a")
    assert one.key == Question("g:9", ({"content": "hi", "role": "user"},), reference="b").key
    assert one.key != Question("f:1", ({"role": "user", "content": "ho"},)).key
    assert one.key != Question("f:1", ({"role": "user", "content": "hi"},), tools=({"type": "function"},)).key
