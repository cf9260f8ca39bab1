from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.data.example import Example, Place
from tunery.data.split import content_key, draw, hold_out, shuffled, text_key, without_duplicates, without_texts
from tunery.errors import ConfigError


def labelled(*pairs: tuple[str, str]) -> list[Example]:
    return [
        Example("classification", Place("f", line), text=text, label=label) for line, (text, label) in enumerate(pairs)
    ]


def numbered(count: int, labels: str = "ab") -> list[Example]:
    return labelled(*((f"text {number}", labels[number % len(labels)]) for number in range(count)))


def chat(*said: tuple[str, str]) -> Example:
    return Example("chat", Place("f", 1), messages=tuple({"role": role, "content": content} for role, content in said))


class TestTextKey:
    def test_case_and_spacing_do_not_make_another_text(self):
        a, b = labelled((" A  good\nFILM ", "x"), ("a good film", "y"))
        assert text_key(a) == text_key(b)
        assert content_key(a) != content_key(b)

    def test_a_conversation_goes_by_what_the_user_says(self):
        one = chat(("system", "s"), ("user", "Hi"), ("assistant", "a"))
        other = chat(("user", "hi "), ("assistant", "b"))
        assert text_key(one) == text_key(other)
        assert text_key(one) != text_key(chat(("user", "hi"), ("assistant", "a"), ("user", "more"), ("assistant", "b")))

    def test_rows_without_input_go_by_their_answer(self):
        empty = [Example("completion", Place("f", 1), prompt=" ", completion=answer) for answer in ("a", "b")]
        assert text_key(empty[0]) != text_key(empty[1])
        assert text_key(chat(("assistant", "a"))) != text_key(chat(("assistant", "b")))


class TestHoldOut:
    @pytest.mark.parametrize(("rows", "share", "held"), [(100, 0.1, 10), (100, 25, 25), (3, 0.1, 1), (2, 0.99, 1)])
    def test_how_many(self, rows, share, held):
        train, validation = hold_out(numbered(rows), share, 0)
        assert (len(train), len(validation)) == (rows - held, held)

    def test_the_seed_decides_and_the_order_of_the_file_does_not(self):
        rows = numbered(200)
        texts = {row.text for row in hold_out(rows, 0.2, 1)[1]}
        assert texts == {row.text for row in hold_out(rows[::-1], 0.2, 1)[1]}
        assert texts != {row.text for row in hold_out(rows, 0.2, 2)[1]}

    def test_labels_keep_their_shares(self):
        rows = numbered(1000, "aaaaaabbbc")
        for seed in range(5):
            assert Counter(row.label for row in hold_out(rows, 0.1, seed)[1]) == {"a": 60, "b": 30, "c": 10}

    def test_the_first_held_out_rows_are_mixed_even_if_the_file_is_sorted(self):
        rows = sorted(numbered(1000), key=lambda row: row.label)
        first = Counter(row.label for row in hold_out(rows, 0.2, 0)[1][:50])
        assert min(first["a"], first["b"]) > 10

    def test_training_rows_keep_their_order(self):
        rows = numbered(50)
        train, _ = hold_out(rows, 0.3, 0)
        assert train == [row for row in rows if row in train]

    def test_a_text_with_most_of_the_rows_is_not_split(self):
        rows = labelled(*[("same", "a")] * 90, *[(f"other {n}", "a") for n in range(10)])
        for seed in range(5):
            train, validation = hold_out(rows, 0.2, seed)
            assert {row.text for row in validation} == {f"other {n}" for n in range(10)}
            assert len(train) == 90

    def test_only_large_texts(self):
        rows = labelled(*[("one", "a")] * 5, *[("two", "a")] * 4)
        train, validation = hold_out(rows, 0.1, 0)
        assert {row.text for row in validation} == {"two"}
        assert len(train) == 5

    def test_nothing_to_split(self):
        same = labelled(("A", "x"), ("a", "y"))
        assert hold_out(same, 0.5, 0) == (same, [])
        with pytest.raises(ConfigError, match="same text"):
            hold_out(same, 1, 0)

    @pytest.mark.parametrize("share", [10, 11])
    def test_a_number_that_leaves_nothing_to_train_on(self, share):
        with pytest.raises(ConfigError, match="only 10 in all"):
            hold_out(numbered(10), share, 0)

    @settings(max_examples=200, deadline=None)
    @given(
        pairs=st.lists(
            st.tuples(st.sampled_from(["a", "A ", "b", "c", "d", "e  e", "e e"]), st.sampled_from("xyz")), min_size=2
        ),
        share=st.floats(0.01, 0.99),
        seed=st.integers(0, 2**63 - 1),
    )
    def test_no_text_is_on_both_sides_and_no_row_is_lost(self, pairs, share, seed):
        rows = labelled(*pairs)
        train, validation = hold_out(rows, share, seed)
        assert sorted(row.where for row in [*train, *validation]) == sorted(row.where for row in rows)
        assert not {text_key(row) for row in train} & {text_key(row) for row in validation}
        assert train
        texts = len({text_key(row) for row in rows})
        assert bool(validation) == (texts > 1)


def test_duplicates_repeat_everything():
    rows = labelled(("a", "x"), ("a", "y"), ("a", "x"), ("A", "x"), ("a", "x"))
    unique, count = without_duplicates(rows)
    assert [row.where for row in unique] == ["f:0", "f:1", "f:3"]
    assert count == 2


def test_texts_that_are_held_out_leave_training():
    rows = labelled(("a", "x"), ("b", "x"), ("B ", "y"))
    assert without_texts(rows, labelled(("b", "z"))) == rows[:1]


def test_draw_keeps_the_order_and_follows_the_seed():
    rows = numbered(100)
    drawn = draw(rows, 10, 0)
    assert drawn == [row for row in rows if row in drawn]
    assert len(drawn) == 10
    assert drawn == draw(rows, 10, 0)
    assert drawn != draw(rows, 10, 1)
    assert draw(rows, 1000, 0) == rows


def test_shuffled_keeps_every_row():
    rows = numbered(50)
    mixed = shuffled(rows, 3)
    assert mixed != rows
    assert sorted(row.where for row in mixed) == sorted(row.where for row in rows)
