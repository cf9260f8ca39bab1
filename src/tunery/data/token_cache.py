"""Tokenised rows, kept on disk under a hash of everything they follow from, so that no row is tokenised twice.

The hash covers the rows' content, the tokenizer with its vocabulary and chat template, the instruction, system message,
date, labels and length limit, the versions of tokenizers and transformers, and tunery's own code for rendering:
whatever changes, the old entry is simply not found. Places ("file:line") are not part of it, and are put in from the
rows at hand. An entry is one safetensors file, written whole or not at all, with a hash of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from tunery.data.batching import Row
from tunery.data.example import Example
from tunery.errors import TuneryError
from tunery.jsonl import JsonMapping, JsonObject
from tunery.paths import cache_dir, write_atomic
from tunery.versions import version_of

if TYPE_CHECKING:
    from tunery.data.render import Renderer

LIMIT_BYTES = 4 << 30
"""The entries together. Beyond it, those not used for longest go; a single one of more than half is not kept."""

_CHUNK = 1000
_ARRAYS = ("ids", "weights", "lengths", "examples", "desirable")
_DESIRABLE = {None: -1, False: 0, True: 1}
_CODE = Path(__file__).parent
"""The code that tokens follow from: all of it here, so that none is forgotten."""


def entry_key(renderer: Renderer, examples: Sequence[Example], limit: int, too_long: str) -> str:
    """The hash of everything that the tokens of these rows follow from."""
    settings = [
        renderer.tokenizer_sha256,
        renderer.template_sha256,
        renderer.labels,
        renderer.instruction,
        renderer.system,
        str(renderer.date),
        limit,
        too_long,
        [version_of(name) for name in ("tokenizers", "transformers", "jinja2")],
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(_code_sha256())
    names = [f.name for f in fields(Example) if f.name != "where"]
    for start in range(0, len(examples), _CHUNK):
        rows = [[getattr(example, name) for name in names] for example in examples[start : start + _CHUNK]]
        digest.update(json.dumps(rows, default=dict).encode())
    return digest.hexdigest()


def _code_sha256() -> bytes:
    digest = hashlib.sha256(version_of("tunery").encode())
    for file in sorted(_CODE.rglob("*.py")):  # an installation without sources goes by its version
        digest.update(file.read_bytes())
    return digest.digest()


def load(key: str, examples: Sequence[Example]) -> tuple[JsonObject, dict[str, int]] | None:
    """An entry: what `store` was given, with the places of `examples`, and the remarks; None without a sound one."""
    from safetensors import SafetensorError

    file = _file(key)
    try:
        with _opened(file) as entry:
            arrays = {name: entry.get_tensor(name) for name in _ARRAYS}
            facts = json.loads(entry.metadata()["facts"])
            sound = entry.metadata()["sha256"] == _content_sha256(arrays, entry.metadata()["facts"])
        if not sound:
            return None
        os.utime(file)  # used just now
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    truncated: list[int] = facts["truncated"]
    dropped: list[tuple[int, str]] = facts["dropped"]
    return {
        **facts["more"],
        "rows": _cut_apart(arrays, examples),
        "truncated": [examples[number].where for number in truncated],
        "dropped": [(examples[number].where, reason) for number, reason in dropped],
    }, facts["remarks"]


def _opened(file: Path) -> contextlib.AbstractContextManager[Any]:
    from safetensors import safe_open

    return safe_open(file, framework="np")


def _cut_apart(arrays: Mapping[str, np.ndarray], examples: Sequence[Example]) -> list[Row]:
    ends: list[int] = np.cumsum(arrays["lengths"]).tolist()
    lengths: list[int] = arrays["lengths"].tolist()
    numbers: list[int] = arrays["examples"].tolist()
    answers: list[int] = arrays["desirable"].tolist()
    weights = arrays["weights"].astype(np.float32)
    desirable = {number: value for value, number in _DESIRABLE.items()}
    return [
        Row(
            arrays["ids"][end - length : end],
            weights[end - length : end],
            examples[number].where,
            number,
            desirable[answer],
        )
        for end, length, number, answer in zip(ends, lengths, numbers, answers, strict=True)
    ]


def store(key: str, tokenized: JsonMapping, examples: Sequence[Example], remarks: Mapping[str, int]) -> None:
    """Keep tokenised rows. A cache that cannot be written costs time, nothing else.

    Args:
        tokenized: attributes of tunery.data.prepare.Rows.
        remarks: what rendering these rows noticed, by sentence, with the number of rows.
    """
    from safetensors.numpy import save

    rows: Sequence[Row] = tokenized["rows"]
    numbers = {example.where: number for number, example in reversed(list(enumerate(examples)))}
    weights = _join([row.weights for row in rows], np.float32)
    whole = weights.astype(np.uint8)
    arrays = {
        "ids": _join([row.ids for row in rows], np.int32),
        "weights": whole if np.array_equal(whole, weights) else weights,
        "lengths": np.asarray([len(row.ids) for row in rows], np.int64),
        "examples": np.asarray([row.example for row in rows], np.int64),
        "desirable": np.asarray([_DESIRABLE[row.desirable] for row in rows], np.int8),
    }
    facts = json.dumps(
        {
            "truncated": [numbers[where] for where in tokenized["truncated"]],
            "dropped": [(numbers[where], reason) for where, reason in tokenized["dropped"]],
            "more": {name: value for name, value in tokenized.items() if name not in ("rows", "truncated", "dropped")},
            "remarks": dict(remarks),
        }
    )
    content = save(arrays, metadata={"facts": facts, "sha256": _content_sha256(arrays, facts)})
    if len(content) > LIMIT_BYTES // 2:
        return
    with contextlib.suppress(OSError, TuneryError):
        write_atomic(_file(key), content)
        _prune()


def _join(parts: Sequence[np.ndarray], dtype: DTypeLike) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _content_sha256(arrays: Mapping[str, np.ndarray], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _file(key: str) -> Path:
    return cache_dir() / "tokens" / f"{key}.safetensors"


def _prune() -> None:
    """Remove the entries that were not used for longest until the others keep to LIMIT_BYTES."""
    entries = sorted(
        (file.stat().st_mtime, file.stat().st_size, file) for file in _file("x").parent.glob("*.safetensors")
    )
    left = sum(size for _, size, _ in entries)
    for _, size, file in entries:
        if left <= LIMIT_BYTES:
            break
        file.unlink(missing_ok=True)
        left -= size
