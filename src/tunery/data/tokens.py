"""Texts to tokens, in memory that does not grow with the longest text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 1 << 16
"""Characters that are tokenised at once; a longer text is taken in windows that overlap."""

OVERLAP = 1 << 11
AGREE = 16
"""Tokens that two windows must have in common, one after another and at the same places, to be joined there."""


class Tokens(NamedTuple):
    """The tokens of a text.

    Attributes:
        ids: of the tokens.
        starts: int64 [n], where each begins in the text, in characters.
    """

    ids: list[int]
    starts: np.ndarray


class TextEncoder:
    """Tokenises texts as they stand, without the tokens that a tokenizer puts around one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text."""
        result: list[Tokens] = []
        for batch in _batches(texts):
            result += self._windows(batch[0]) if len(batch[0]) > WINDOW else self._at_once(batch)
        return result

    def _at_once(self, texts: Sequence[str]) -> list[Tokens]:
        out = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [
            Tokens(ids, np.fromiter((start for start, _ in offsets), np.int64, len(offsets)))
            for ids, offsets in zip(out["input_ids"], out["offset_mapping"], strict=True)
        ]

    def _windows(self, text: str) -> list[Tokens]:
        """A long text. What a token is depends on the characters near it: where two windows that overlap agree on
        enough tokens in a row, they agree with the text as a whole."""
        [found] = self._at_once([text[:WINDOW]])
        ids, starts = [found.ids], [found.starts]
        end = WINDOW
        while end < len(text):
            begin = end - OVERLAP
            end = begin + WINDOW
            [found] = self._at_once([text[begin:end]])
            new = Tokens(found.ids, found.starts + begin)
            joint = _joint(Tokens(ids[-1], starts[-1]), new, begin)
            if joint is None:
                return self._at_once([text])
            ids[-1], starts[-1] = ids[-1][: joint[0]], starts[-1][: joint[0]]
            ids.append(new.ids[joint[1] :])
            starts.append(new.starts[joint[1] :])
        return [Tokens([token for part in ids for token in part], np.concatenate(starts))]

    def first_tokens(self) -> list[int]:
        """What the tokenizer puts in front of a text."""
        bare: list[int] = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full: list[int] = self._tokenizer("a")["input_ids"]
        return full[: next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts, in batches of about WINDOW characters; a longer one stands for itself."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > WINDOW:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _joint(before: Tokens, after: Tokens, begin: int) -> tuple[int, int] | None:
    """(tokens of `before` to keep, tokens of `after` to leave out): where the two agree; None if they do not.

    Args:
        begin: of the window of `after` in the text.
    """
    places = {int(start): index for index, start in enumerate(after.starts[: 2 * OVERLAP])}
    first = int(np.searchsorted(before.starts, begin))
    for mine in range(first, len(before.ids) - AGREE):
        theirs = places.get(int(before.starts[mine]))
        if theirs is None or before.ids[mine : mine + AGREE] != after.ids[theirs : theirs + AGREE]:
            continue
        if np.array_equal(before.starts[mine : mine + AGREE], after.starts[theirs : theirs + AGREE]):
            return mine, theirs
    return None
