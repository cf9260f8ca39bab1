"""From tokens to text that can be sent: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunery.serve.engine.backend import TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "�"
"""What bytes that make no character (yet) decode to: U+FFFD."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text to send, and the log-probabilities of the tokens that it ends."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class Detokenizer:
    """Decodes an answer token by token.

    A decoder's text for a token can depend on the tokens before it (spaces, characters of several tokens). So the last
    few tokens are decoded with and without the newest, and the difference is the newest's text.

    Args:
        decode: token ids → text.
        before: the last tokens of what the answer goes on with, if its first space counts (plain completions).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()):
        self._decode = decode
        self._window = list(before)
        self._shown = len(self._window)  # tokens of the window whose text was given out

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        self._window.append(token)
        shown = self._decode(self._window[: self._shown])
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) or len(text) <= len(shown):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text[len(shown) :]

    def end(self) -> str:
        """What is left: bytes that never became a character show as U+FFFD."""
        return self._decode(self._window)[len(self._decode(self._window[: self._shown])) :]


class TextStream:
    """Cuts an answer at the first stop string, and holds back what may be the beginning of one.

    Attributes:
        stopped: a stop string was found; nothing more is given out.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = ()):
        self._detokenizer, self._stops = detokenizer, tuple(stops)
        self._held = ""
        self._decoded = self._sent = 0  # characters
        self._waiting: list[tuple[int, int, TokenLogprob]] = []  # (where the token's text starts and ends, token)
        self._unplaced: list[TokenLogprob] = []  # tokens of a character that is not complete
        self.stopped = False

    def push(self, token: int, logprob: TokenLogprob | None = None) -> TextDelta:
        """A further token of the answer."""
        if logprob is not None:
            self._unplaced.append(logprob)
        return self._take(self._detokenizer.push(token))

    def end(self) -> TextDelta:
        """The answer ended by itself or by its limit: what was held back."""
        if self.stopped:
            return TextDelta()
        piece = self._take(self._detokenizer.end())
        if self.stopped:
            return piece
        rest, self._held = self._held, ""
        tokens = [*(token for _, _, token in self._waiting), *self._unplaced]
        self._waiting, self._unplaced = [], []
        return TextDelta(piece.text + rest, piece.logprobs + tuple(tokens))

    def _take(self, text: str) -> TextDelta:
        start, self._decoded = self._decoded, self._decoded + len(text)
        if text:
            self._waiting += [(start, self._decoded, token) for token in self._unplaced]
            self._unplaced = []
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            sent = self._held[: min(found)]
            cut = self._sent + len(sent)
            return TextDelta(sent, tuple(token for begin, _, token in self._waiting if begin < cut))
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        sent, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._sent += len(sent)
        ready = tuple(token for _, end, token in self._waiting if end <= self._sent)
        self._waiting = [each for each in self._waiting if each[1] > self._sent]
        return TextDelta(sent, ready)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# --------------------------------------------------------------------------- single tokens


class TokenTexts:
    """The bytes of single tokens, for byte-level tokenizers (GPT-2's, 2019) and those of SentencePiece."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        kinds = _kinds(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
        self._bytes = _byte_characters() if "ByteLevel" in kinds else None
        self._pieces = "ByteFallback" in kinds or "Metaspace" in kinds
        self._added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}

    def bytes(self, token: int) -> bytes:
        """A token's text in UTF-8; of a part of a character, the part."""
        if token in self._added:
            return self._added[token].encode()
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):  # None: the model has more rows than the tokenizer has tokens
            return b""
        if self._bytes is not None:
            return bytes(self._bytes[character] for character in name if character in self._bytes)
        if self._pieces:
            if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
                return bytes([int(name[3:5], 16)])
            return name.replace("▁", " ").encode()
        return self._tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False).encode()

    def logprob(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]] = ()) -> TokenLogprob:
        """A token as the API shows it."""
        content = self.bytes(token)
        return TokenLogprob(
            content.decode(errors="replace"),
            logprob,
            tuple(content),
            tuple(self.logprob(other, value) for other, value in top),
        )


def _kinds(decoder: object) -> set[str]:
    """The types of decoders in a tokenizer's description."""
    if not isinstance(decoder, dict):
        return set()
    inner = [kind for part in decoder.get("decoders", ()) for kind in _kinds(part)]
    return {str(decoder.get("type")), *inner}


def _byte_characters() -> dict[str, int]:
    """The character by which byte-level tokenizers write a byte (Radford et al. 2019, the released encoder).

    It is the byte's own where that can be seen, else one from U+0100 on, in order.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
