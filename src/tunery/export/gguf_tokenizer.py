"""A tokenizer as a GGUF file holds it: tokens, their kinds, merges or scores, and the name of its way to cut text.

Two families are known. Byte-level BPE ("gpt2" in GGUF) cuts text by a pattern that llama.cpp knows by name, then merges
by rank. SentencePiece's BPE ("llama") merges by the score of the result, spaces written as ▁. What is written here is
afterwards compared in llama.cpp, token by token (tunery.export.verify).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf
from gguf import TokenType

from tunery.data.render import Renderer
from tunery.errors import ConfigError
from tunery.jsonl import JsonMapping, JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_MODERN = (
    rf"(?i:{_WORDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = "bytes"
_WORD_BYTES = "words, bytes"
_DIGITS = "digits"

CUTS: dict[tuple[str, ...], str] = {
    (_WORD_BYTES,): "gpt-2",
    (_DIGITS, _WORD_BYTES): "smollm",
    (_MODERN % "{1,3}", _BYTES): "llama-bpe",
    (_MODERN % "", _BYTES): "qwen2",
    (_CASED % (f"(?i:{_WORDS})?", f"(?i:{_WORDS})?", "{1,3}"), _BYTES): "gpt-4o",
    (_CASED % ("", "", ""), _BYTES): "tekken",
}
"""Steps that cut a text before the merges → llama.cpp's name for them. The patterns are those of GPT-2, SmolLM,
Llama 3, Qwen 2, GPT-4o and Mistral Nemo."""

SPACE = "▁"
"""Stands for a space in SentencePiece's tokens."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

LOWEST_SCORE = -1e6
"""Of tokens that no merge makes."""


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer.

    Attributes:
        model: "gpt2" or "llama".
        cut: llama.cpp's name of how a text is cut; "default" for "llama".
        kinds: of each token (gguf.TokenType).
        merges: "left right" by rank; for "gpt2".
        scores: of each token; for "llama".
        space_first: a space is put before a text; for "llama".
    """

    model: str
    cut: str
    tokens: list[str]
    kinds: list[TokenType]
    merges: list[str]
    scores: list[float]
    space_first: bool = False


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Take a tokenizer of transformers apart.

    Args:
        rows: of the model's embedding; a shorter vocabulary is filled up, tokens beyond it are left out.

    Raises:
        ConfigError: it is of a family that llama.cpp has no name for.
    """
    from transformers import PreTrainedTokenizerFast

    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # others are not loaded
    parts: JsonObject = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _unknown(f"its model is {model['type']}")
    steps = _steps(parts.get("pre_tokenizer"))
    if any(step["type"] == "ByteLevel" for step in steps):
        _check_normalizer(parts.get("normalizer"))
        tokens, kinds = _tokens(parts, rows, sentencepiece=False)
        return Vocabulary("gpt2", _cut(steps), tokens, kinds, [" ".join(pair) for pair in _merges(model)], [])
    if model.get("byte_fallback"):
        tokens, kinds = _tokens(parts, rows, sentencepiece=True)
        scores = _scores(model, tokens)
        return Vocabulary("llama", "default", tokens, kinds, [], scores, _space_first(parts, steps))
    raise _unknown("it is neither byte-level nor SentencePiece's BPE")


def _unknown(what: str) -> ConfigError:
    return ConfigError(
        f"llama.cpp has no name for this tokenizer: {what}",
        "use --to merged; for other tokenizers llama.cpp's own convert_hf_to_gguf.py may know one",
    )


def _steps(pre_tokenizer: JsonMapping | None) -> list[JsonMapping]:
    if not pre_tokenizer:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    return [pre_tokenizer]


def _cut(steps: Sequence[JsonMapping]) -> str:
    signature = []
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            signature.append(_WORD_BYTES if step.get("use_regex", True) else _BYTES)
        elif kind == "Digits" and step.get("individual_digits"):
            signature.append(_DIGITS)
        elif kind == "Split" and (step["behavior"], step.get("invert", False)) in (
            ("Isolated", False),
            ("Removed", True),
        ):
            signature.append(step["pattern"].get("Regex", str(step["pattern"])))
        else:
            raise _unknown(f"it cuts text with {json.dumps(step, ensure_ascii=False)}")
    if tuple(signature) not in CUTS:
        raise _unknown(f"it cuts text by {'; '.join(signature)}")
    return CUTS[tuple(signature)]


def _check_normalizer(normalizer: JsonMapping | None) -> None:
    """NFC is let pass: llama.cpp does not compose letters, and hardly any text holds decomposed ones."""
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if other := [part["type"] for part in parts if part["type"] != "NFC"]:
        raise _unknown(f"it rewrites text first ({', '.join(other)})")


def _tokens(parts: JsonMapping, rows: int, *, sentencepiece: bool) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    for token, number in parts["model"]["vocab"].items():
        if number < rows:
            tokens[number] = token
            kinds[number] = TokenType.BYTE if sentencepiece and _BYTE.fullmatch(token) else TokenType.NORMAL
    for added in parts["added_tokens"]:
        number, content = added["id"], added["content"]
        if number >= rows:
            continue
        if added["special"]:
            unknown = sentencepiece and content == parts["model"].get("unk_token")
            tokens[number], kinds[number] = content, TokenType.UNKNOWN if unknown else TokenType.CONTROL
        else:  # found in the text before spaces are rewritten
            plain = content.replace(SPACE, " ") if sentencepiece else content
            tokens[number], kinds[number] = plain, TokenType.USER_DEFINED
    return tokens, kinds


def _merges(model: JsonMapping) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else (m[0], m[1]) for m in model["merges"]]  # type: ignore[misc]


def _scores(model: JsonMapping, tokens: Sequence[str]) -> list[float]:
    """SentencePiece joins the pair whose result scores highest; the first merge to make a token has rank 0."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    return [float(-ranks[token]) if token in ranks else LOWEST_SCORE for token in tokens]


def _space_first(parts: JsonMapping, steps: Sequence[JsonMapping]) -> bool:
    normalizer = parts.get("normalizer") or {}
    prepended = any(part["type"] == "Prepend" for part in normalizer.get("normalizers", [normalizer]) if part)
    metaspace = [step for step in steps if step["type"] == "Metaspace"]
    return prepended or any(step.get("prepend_scheme", "always") != "never" for step in metaspace)


def write_tokenizer(out: gguf.GGUFWriter, renderer: Renderer, rows: int, *, templated: bool) -> None:
    """Write the run's tokenizer and chat template.

    Args:
        rows: of the model's embedding.
        templated: the run's rows are conversations.

    Raises:
        ConfigError: llama.cpp has no name for it, or it puts more than one token before a text.
    """
    tokenizer = renderer.tokenizer
    vocabulary = read_vocabulary(tokenizer, rows)
    out.add_tokenizer_model(vocabulary.model)
    out.add_tokenizer_pre(vocabulary.cut)
    out.add_token_list(vocabulary.tokens)
    out.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.merges:
        out.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        out.add_token_scores(vocabulary.scores)
    out.add_add_space_prefix(vocabulary.space_first)
    out.add_add_bos_token(begins_with_bos(renderer, templated=templated))
    out.add_add_eos_token(False)
    for add, number in (
        (out.add_bos_token_id, tokenizer.bos_token_id),
        (out.add_eos_token_id, tokenizer.eos_token_id),
        (out.add_unk_token_id, tokenizer.unk_token_id),
        (out.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if isinstance(number, int) and number < rows:
            add(number)
    end = renderer.end_of_turn
    if end is not None and end != tokenizer.eos_token_id:
        out.add_eot_token_id(end)
    if tokenizer.chat_template:
        out.add_chat_template(str(tokenizer.chat_template))


def begins_with_bos(renderer: Renderer, *, templated: bool) -> bool:
    """Whether llama.cpp should put the first token before a prompt.

    Of a conversation it takes away the one that the template writes, and puts it there itself.

    Raises:
        ConfigError: the tokenizer puts something else before a text.
    """
    bos = renderer.tokenizer.bos_token_id
    if templated:
        ids = renderer.encode_prompt(renderer.prompt([{"role": "user", "content": "a"}]))
        return bos is not None and bos == ids[0] and renderer.tokenizer.chat_template is not None and _writes(renderer)
    first = renderer.encode_prompt("", begin=True)
    if first not in ([], [bos]):
        raise ConfigError(f"the tokenizer puts {len(first)} tokens before a text, and llama.cpp at most one", None)
    return first == [bos]


def _writes(renderer: Renderer) -> bool:
    """Whether the token before a prompt is really a beginning: SmolLM's and other ChatML models name as their first
    token the one that opens every turn."""
    bos = renderer.tokenizer.bos_token_id
    two_turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    return renderer.encode_prompt(renderer.prompt(two_turns)).count(bos) == 1  # type: ignore[arg-type]
