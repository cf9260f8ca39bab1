"""From tokens to text: whole characters, stop strings, and where log-probabilities belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_tokenizer
from tunery.serve.engine.backend import TokenLogprob
from tunery.serve.engine.detokenizer import Detokenizer, TextStream, TokenTexts

TOKENIZER = tiny_tokenizer()
DECODE = TOKENIZER.backend_tokenizer.decode
TEXTS = TokenTexts(TOKENIZER)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def stream(tokens: list[int], stops: list[str]) -> tuple[list[str], TextStream]:
    """What is sent after each token, and at the end."""
    reader = TextStream(Detokenizer(DECODE), stops)
    sent = []
    for token in tokens:
        sent.append(reader.push(token).text)
        if reader.stopped:
            return sent, reader
    sent.append(reader.end().text)
    return sent, reader


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(3, len(TOKENIZER) - 1), max_size=40))
def test_pieces_together_are_the_text_of_all_tokens(tokens: list[int]) -> None:
    sent, _ = stream(tokens, [])
    assert "".join(sent) == DECODE(tokens)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_no_piece_holds_a_broken_character(text: str) -> None:
    sent, _ = stream(ids(text), [])
    assert "".join(sent) == text
    assert all("�" not in piece for piece in sent) or "�" in text


def test_a_character_of_several_tokens_comes_when_it_is_whole() -> None:
    tokens = ids("🎈")
    assert len(tokens) == 4
    assert stream(tokens, [])[0] == ["", "", "", "🎈", ""]
    assert stream(tokens[:2], [])[0] == ["", "", "�"]


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab\n ", max_size=25),
    st.lists(st.text(alphabet="ab\n ", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_an_answer_ends_before_the_first_stop_string_and_shows_nothing_of_it(text: str, stops: list[str]) -> None:
    """The first is the one that is complete first."""
    tokens = ids(text)
    sent, reader = stream(tokens, stops)
    parts = (DECODE(tokens[:count]) for count in range(len(tokens) + 1))
    shown = next((part for part in parts if any(stop in part for stop in stops)), "")
    cut = min((at for stop in stops if (at := shown.find(stop)) >= 0), default=None)
    assert reader.stopped == (cut is not None)
    assert "".join(sent) == text[:cut]
    so_far = ""
    for piece in sent:  # at no time was more sent than belongs to the answer
        so_far += piece
        assert text[:cut].startswith(so_far)


def test_text_is_not_held_back_without_reason() -> None:
    sent, _ = stream(ids("hello there"), ["###"])
    assert sent[-1] == ""
    sent, _ = stream(ids("a ##"), ["###"])
    assert "".join(sent[:-1]) == "a "
    assert sent[-1] == "##"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab€ ", max_size=20), st.text(alphabet="ab€", min_size=1, max_size=4))
def test_every_token_of_the_answer_has_its_log_probability_once(text: str, stop: str) -> None:
    reader = TextStream(Detokenizer(DECODE), [stop])
    shown: list[TokenLogprob] = []
    sent = ""
    for number, token in enumerate(ids(text)):
        piece = reader.push(token, TokenLogprob(str(number), -1.0, ()))
        shown += piece.logprobs
        sent += piece.text
        if reader.stopped:
            break
    else:
        piece = reader.end()
        shown += piece.logprobs
        sent += piece.text
        assert len(shown) == len(ids(text))
    assert [entry.token for entry in shown] == [str(i) for i in range(len(shown))]
    covered = DECODE(ids(text)[: len(shown)])
    assert covered.startswith(sent)
    if shown:  # no token that begins after the answer's end
        assert len(DECODE(ids(text)[: len(shown) - 1]).rstrip("�")) < max(len(sent), 1)


def test_the_first_space_shows_where_the_prompts_tokens_are_known() -> None:
    """A decoder that strips the first space, as SentencePiece's does."""

    def decode(tokens: Sequence[int]) -> str:
        return "".join({0: " the", 1: " cat", 2: "s"}[token] for token in tokens).removeprefix(" ")

    def answer(before: list[int]) -> str:
        detokenizer = Detokenizer(decode, before)
        return "".join(detokenizer.push(token) for token in (1, 2))

    assert answer([]) == "cats"
    assert answer([0]) == " cats"


def test_tokens_show_their_bytes() -> None:
    tokens = ids("né 🎈 x")
    assert b"".join(TEXTS.bytes(token) for token in tokens) == "né 🎈 x".encode()
    assert TEXTS.bytes(2) == b"<|im_end|>"
    assert TEXTS.bytes(10_000) == b""
    shown = TEXTS.logprob(ids("🎈")[0], -0.5, [(ids("x")[0], -1.0)])
    assert shown.token == "�"
    assert shown.bytes == ("🎈".encode()[0],)
    assert shown.top[0].token == "x"


@pytest.mark.parametrize(
    ("decoder", "name", "content"),
    [
        ({"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}, "▁the", b" the"),
        ({"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}, "<0xE2>", b"\xe2"),
        ({"type": "Metaspace"}, "▁a▁b", b" a b"),
    ],
)
def test_sentencepiece_tokens_show_their_bytes(decoder: dict, name: str, content: bytes) -> None:
    import json

    class Backend:
        def to_str(self) -> str:
            return json.dumps({"decoder": decoder})

    class Fake:
        backend_tokenizer = Backend()
        added_tokens_decoder: dict = {}  # noqa: RUF012

        def convert_ids_to_tokens(self, token: int) -> str:
            return name

    fake: Any = Fake()
    assert TokenTexts(fake).bytes(5) == content
