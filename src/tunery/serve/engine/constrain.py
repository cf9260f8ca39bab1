"""Answers held to a form: any JSON object, JSON of a schema, calls of tools. The grammars are llguidance's."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tunery.errors import NotInstalledError
from tunery.jsonl import JsonMapping
from tunery.serve.api_errors import ApiError, shorten
from tunery.versions import install_command

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerFast

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"
"""Between the parts of a JSON text. Bounded, so that a small model cannot go on with blanks until its limit."""

JSON = {"whitespace_pattern": WHITESPACE}


def json_grammar(schema: JsonMapping | None, strict: bool) -> str:
    """A grammar of the JSON texts of a schema; None: of any JSON object.

    Args:
        strict: keywords that the library does not know are errors; otherwise they are left out.
    """
    options: Any = JSON if strict else {**JSON, "lenient": True}
    return _matchers().grammar_from_json_schema(
        dict(schema) if schema is not None else {"type": "object"}, overrides=options
    )


def lark_grammar(rules: str) -> str:
    """A grammar written in llguidance's form of Lark."""
    return _matchers().grammar_from_lark(rules)


def inline_schema(schema: JsonMapping | None, strict: bool) -> str:
    """A schema as a terminal of a Lark grammar; None: any JSON object."""
    options = JSON if strict else {**JSON, "lenient": True}
    return f"%json {json.dumps({**(schema or {'type': 'object'}), 'x-guidance': options})}"


def _matchers() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise NotInstalledError(
            "answers in a given form need the library llguidance", install_command("serve")
        ) from error
    return LLMatcher


class Matcher:
    """A grammar at one place of one answer.

    Attributes:
        done: the answer is complete, and nothing but its end may follow.

    Args:
        vocabulary: number of the model's logits.
        words: tokens that the grammar knows, at least as many.
    """

    def __init__(self, inner: LLMatcher, vocabulary: int, words: int):
        self._inner, self._vocabulary = inner, vocabulary
        self._mask = np.zeros((1, (words + 31) // 32), np.int32)

    @property
    def done(self) -> bool:
        """See above."""
        return bool(self._inner.is_stopped()) and not self._inner.is_error()

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [vocabulary], on the CPU. Those that end an answer may where it is complete.

        Raises:
            ApiError: the grammar is too large for the library.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._inner, self._mask, 0)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._vocabulary]
        if self._inner.is_error() or not bits.any():
            raise ApiError(400, f"The answer could not be held to its form: {_first_line(self._inner.get_error())}")
        return torch.from_numpy(bits.astype(bool))

    def accept(self, token: int) -> None:
        """The answer goes on with this token, one of those allowed."""
        self._inner.consume_token(token)

    def copy(self) -> Matcher:
        """Another answer at the same place."""
        return Matcher(self._inner.deep_copy(), self._vocabulary, self._mask.size * 32)


class Grammars:
    """Grammars for one tokenizer, whose words are prepared when they are first needed (about a second).

    Args:
        vocabulary: number of the model's logits.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, stop_ids: Sequence[int]):
        self._tokenizer, self.vocabulary, self._stop_ids = tokenizer, vocabulary, list(stop_ids)
        self._size = max(vocabulary, len(tokenizer))
        self._words: LLTokenizer | None = None
        self._lock = threading.Lock()

    def matcher(self, grammar: str, param: str) -> Matcher:
        """The grammar at the beginning of an answer. May be called from any thread.

        Args:
            param: field of the request that asked for it.

        Raises:
            ApiError: 400, the library refuses the schema.
        """
        inner = _matchers()(self._prepared(), grammar, log_level=0)
        if inner.is_error():
            raise ApiError(
                400,
                f"Invalid '{param}': no answer can be held to it: {_first_line(inner.get_error())}",
                code="invalid_value",
                param=param,
            )
        return Matcher(inner, self.vocabulary, self._size)

    def _prepared(self) -> LLTokenizer:
        with self._lock:
            if self._words is None:
                from llguidance.hf import from_tokenizer

                self._words = from_tokenizer(self._tokenizer, n_vocab=self._size, eos_token=self._stop_ids)
            return self._words


def _first_line(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip()), "no reason is given")
    return shorten(line.strip(), 300)
