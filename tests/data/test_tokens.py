"""Long texts give the tokens that they give as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from tunery.data.tokens import TextEncoder

TEXTS = {
    "words": "the film was not bad, and not good either; " * 3000,
    "lines": "".join(f"line {n}\n\n" for n in range(12_000)),
    "one letter": "a" * 150_000,
    "without blanks": "ab1cd2" * 25_000,
    "several bytes a character": "Žluťoučký kůň 漢字 🙂 " * 6000,
    "control tokens": "<|im_start|>user\nhello<|im_end|>\n" * 4000,
    "blanks": " " * 100_000 + "end",
}


@pytest.mark.parametrize("name", TEXTS)
def test_windows_make_up_the_whole(name: str) -> None:
    tokenizer = tiny_tokenizer()
    text = TEXTS[name]
    [found] = TextEncoder(tokenizer)([text])
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert found.ids == whole["input_ids"]
    assert np.array_equal(found.starts, [start for start, _ in whole["offset_mapping"]])


def test_short_and_long_texts_keep_their_order() -> None:
    encode = TextEncoder(tiny_tokenizer())
    texts = ["a", TEXTS["words"], "", "b " * 40_000, "c"]
    assert [tokens.ids for tokens in encode(texts)] == [encode([text])[0].ids for text in texts]
