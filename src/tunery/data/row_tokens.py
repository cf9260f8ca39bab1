"""Rendered rows to tokens, each marked as trained or not."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tunery.data.example import Rendered
from tunery.data.tokens import TextEncoder


def encode_rows(
    rendered: Sequence[Rendered], encode: TextEncoder, special: re.Pattern[str] | None, last: list[int]
) -> list[tuple[list[int], list[bool]]]:
    """Token ids, and which of them are trained, of each row.

    A row is tokenised as a whole when that leaves every prompt as it will be tokenised when the model is asked; where a
    token would straddle the border, the parts are tokenised one by one.

    Args:
        special: matches the control tokens of the tokenizer.
        last: the end-of-sequence token, if there is one.
    """
    wholes = encode([row.text for row in rendered])
    asked = [
        (index, first, text)
        for index, (row, whole) in enumerate(zip(rendered, wholes, strict=True))
        for first, text in _prompt_ends(row, whole.starts, special)
    ]
    clean = [True] * len(rendered)
    for (index, first, _), (ids, _) in zip(asked, encode([text for *_, text in asked]), strict=True):
        clean[index] &= wholes[index].ids[first : first + len(ids)] == ids
    first = encode.first_tokens()
    result: list[tuple[list[int], list[bool]]] = []
    for row, (ids, starts), is_clean in zip(rendered, wholes, clean, strict=True):
        if is_clean:
            trained = _starts_within(starts, row.spans)
        else:
            ids, trained = _encode_parts(row, encode)
        front, back = (first if row.begin else []), (last if row.end else [])
        result.append(([*front, *ids, *back], [False] * len(front) + trained + [True] * len(back)))
    return result


def _prompt_ends(row: Rendered, starts: np.ndarray, special: re.Pattern[str] | None) -> Iterator[tuple[int, str]]:
    """The prompts of a row from their last control token on, each with the number of tokens before it. A control token
    parts a text: what stands before it has no influence on the tokens of what follows.

    Args:
        starts: int64 [n], of the tokens of the whole row.
    """
    borders = [match.start() for match in special.finditer(row.text)] if special else []
    for start, _ in row.spans:
        if start == 0:
            continue
        border = borders[place - 1] if (place := bisect.bisect_left(borders, start)) else 0
        first = int(np.searchsorted(starts, border)) if border else 0
        if border and (first == len(starts) or starts[first] != border):
            border = first = 0
        yield first, row.text[border:start]


def _encode_parts(row: Rendered, encode: TextEncoder) -> tuple[list[int], list[bool]]:
    borders = sorted({0, len(row.text), *(place for span in row.spans for place in span)})
    ids: list[int] = []
    trained: list[bool] = []
    parts = list(itertools.pairwise(borders))
    for (low, _), (part, _) in zip(parts, encode([row.text[a:b] for a, b in parts]), strict=True):
        ids += part
        trained += [any(a <= low < b for a, b in row.spans)] * len(part)
    return ids, trained


def _starts_within(starts: np.ndarray, spans: Iterable[tuple[int, int]]) -> list[bool]:
    """Which tokens start inside one of the spans."""
    inside = np.zeros(len(starts), bool)
    for low, high in spans:
        inside[np.searchsorted(starts, low) : np.searchsorted(starts, high)] = True
    return inside.tolist()
