"""Rows that were tokenised before come from the cache, bit for bit, and only when nothing has changed."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import CHATML, tiny_tokenizer
from tunery.data import prepare, token_cache
from tunery.data.batching import Row
from tunery.data.example import Example, Place
from tunery.data.prepare import Rows, tokenize, tokenize_once
from tunery.data.render import Renderer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def examples(file: str = "rows.csv") -> list[Example]:
    """Short, long and endless rows; some hold a control token, which is remarked."""
    texts = ["fine", "a film " * 20, "<|im_end|> dull", "żółć 🙂", "x" * 30]
    rows = [
        Example("classification", Place(file, i + 2), text=t, label=("good", "bad")[i % 2]) for i, t in enumerate(texts)
    ]
    return [*rows, dataclasses.replace(rows[0], where=f"{file}:99", label="good" * 60)]


def renderer(**changes: Any) -> Renderer:
    return Renderer(**{"tokenizer": tiny_tokenizer(), "labels": ["good", "bad"], "instruction": "which?", **changes})


def assert_same(a: Rows, b: Rows) -> None:
    assert a.sha256() == b.sha256()
    assert (a.truncated, a.dropped) == (b.truncated, b.dropped)
    assert [(row.where, row.example) for row in a.rows] == [(row.where, row.example) for row in b.rows]
    assert all(
        x.ids.dtype == y.ids.dtype and x.weights.dtype == y.weights.dtype for x, y in zip(a.rows, b.rows, strict=True)
    )


@pytest.fixture
def untouchable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A switch after which nothing may be tokenised afresh."""

    def refuse(*_: Any) -> Rows:
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr(prepare, "tokenize", refuse)


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_with_and_without_the_cache_all_is_the_same(too_long: str, untouchable: Any) -> None:
    plain, first, second = renderer(), renderer(), renderer()
    wanted = tokenize(plain, examples(), 60, too_long)
    assert wanted.dropped
    assert wanted.truncated or too_long == "drop"
    assert plain.remarks.counts
    assert_same(tokenize_once(first, examples(), 60, too_long), wanted)
    untouchable()
    assert_same(tokenize_once(second, examples(), 60, too_long), wanted)
    assert list(second.remarks.counts.items()) == list(plain.remarks.counts.items())
    assert second.remarks.sentences() == first.remarks.sentences() == plain.remarks.sentences()


def test_remarks_of_several_splits_add_up(untouchable: Any) -> None:
    once = renderer()
    for _ in range(2):
        tokenize_once(once, examples(), 60, "cut")
    again = renderer()
    untouchable()
    for _ in range(2):
        tokenize_once(again, examples(), 60, "cut")
    assert again.remarks.counts == once.remarks.counts


def test_the_same_rows_in_another_file_are_found_and_have_their_new_places(untouchable: Any) -> None:
    tokenize_once(renderer(), examples(), 60, "cut")
    wanted = tokenize(renderer(), examples("moved.csv"), 60, "cut")
    untouchable()
    assert_same(tokenize_once(renderer(), examples("moved.csv"), 60, "cut"), wanted)


@pytest.mark.parametrize(
    ("changes", "limit", "too_long"),
    [
        ({"instruction": "what?"}, 60, "cut"),
        ({"system": "be brief"}, 60, "cut"),
        ({"labels": ["bad", "good"]}, 60, "cut"),
        ({"tokenizer": tiny_tokenizer(CHATML.replace("\n", " "))}, 60, "cut"),
        ({}, 59, "cut"),
        ({}, 60, "drop"),
    ],
)
def test_whatever_changes_the_tokens_is_another_entry(changes: dict[str, Any], limit: int, too_long: str) -> None:
    before = token_cache.entry_key(renderer(), examples(), 60, "cut")
    assert token_cache.entry_key(renderer(**changes), examples(), limit, too_long) != before
    assert token_cache.entry_key(renderer(), examples(), 60, "cut") == before


def test_a_changed_tokenizer_or_row_is_another_entry() -> None:
    before = token_cache.entry_key(renderer(), examples(), 60, "cut")
    more = tiny_tokenizer()
    more.add_tokens(["film"])
    assert token_cache.entry_key(renderer(tokenizer=more), examples(), 60, "cut") != before
    rows = examples()
    for change in (
        {"text": "other"},
        {"label": "bad"},
        {"kind": "text"},
        {"messages": ({"role": "user", "content": "a"},)},
    ):
        assert (
            token_cache.entry_key(renderer(), [dataclasses.replace(rows[0], **change), *rows[1:]], 60, "cut") != before
        )
    assert token_cache.entry_key(renderer(), rows[::-1], 60, "cut") != before


def test_a_change_to_any_of_the_code_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "data"
    shutil.copytree(token_cache._CODE, code, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(token_cache, "_CODE", code)
    before = token_cache.entry_key(renderer(), examples(), 60, "cut")
    for file in code.glob("*.py"):
        source = file.read_text(encoding="utf-8")
        file.write_text(source + "# changed\n", encoding="utf-8")
        assert token_cache.entry_key(renderer(), examples(), 60, "cut") != before, file.name
        file.write_text(source, encoding="utf-8")
    assert token_cache.entry_key(renderer(), examples(), 60, "cut") == before


def test_a_damaged_entry_is_made_again(own_cache: Path) -> None:
    wanted = tokenize_once(renderer(), examples(), 60, "cut")
    (file,) = own_cache.iterdir()
    sound = file.read_bytes()
    flipped = bytearray(sound)
    flipped[-1] ^= 1
    for damaged in (b"", sound[:-3], sound[:100], bytes(flipped), b"x" * len(sound)):
        file.write_bytes(damaged)
        assert_same(tokenize_once(renderer(), examples(), 60, "cut"), wanted)
        assert token_cache.load(file.stem, examples()) is not None


def test_a_cache_that_cannot_be_written_does_not_matter(own_cache: Path) -> None:
    own_cache.parent.parent.joinpath("cache").write_text("a file where the folder should be")
    assert_same(tokenize_once(renderer(), examples(), 60, "cut"), tokenize(renderer(), examples(), 60, "cut"))


def test_entries_not_used_for_longest_are_removed(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (60, 61, 62):
        tokenize_once(renderer(), examples(), limit, "cut")
    for age, file in enumerate(sorted(own_cache.iterdir())):
        os.utime(file, (1000 + age, 1000 + age))
    oldest, middle, newest = sorted(own_cache.iterdir())
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", int(3.5 * oldest.stat().st_size))
    tokenize_once(renderer(), examples(), 63, "cut")
    assert not oldest.exists()
    assert middle.exists()
    assert newest.exists()
    assert len(list(own_cache.iterdir())) == 3


def test_everything_a_row_holds_is_kept() -> None:
    """A new field of Row must be stored as well."""
    assert {f.name for f in dataclasses.fields(Row)} == {"ids", "weights", "where", "example", "desirable"}
