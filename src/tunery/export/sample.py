"""The rows on which an export is compared with the adapter: held out of the training, or fixed texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunery.data.example import Example, Place
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import Kind
from tunery.data.prepare import Rows, tokenize, tokenize_once
from tunery.data.read import read_data
from tunery.data.render import Renderer
from tunery.errors import TuneryError
from tunery.export.scores import Probe, make_probe
from tunery.export.subject import Subject

TEXTS = (
    "Hello, world!",
    "The quick brown fox jumps over 12 lazy dogs; it's 3.14159, isn't it?",
    "  two spaces,\ttabs\tand lines\n\n\n1. first\n2. second\n\n   indented",
    "def f(x: int) -> str:\n    return f\"{x:>8}\" if x != 0 else 'none'  # a comment\n",
    "Zażółć gęślą jaźń. Größe, naïve façade, señor, Привет, 你好，世界。 こんにちは",
    "emoji 🙂👩‍💻 and signs ≤ ± € § © … “quoted” — dash",
    "I'LL SAY WE'VE DON'T they'd you're 2024-11-30 1,234,567.89 100% #1 a_b C++",
    'https://example.org/path?q=1&r=%20#top <b>bold</b> {"key": [1, 2, null]}',
)
"""Texts that every tokenizer of an export must cut as the run's does, whatever the rows are."""

_ASKED = (
    "What is the capital of France?",
    "Write one sentence about the sea in winter.",
    "Is 17 a prime number? Answer with yes or no.",
    "Summarise in three words: the meeting was moved from Monday to Friday at 10:30.",
)
_ANSWERED = ("The capital is Paris.", "Grey waves break on an empty shore.", "yes", "Meeting moved to Friday.")


@dataclass(frozen=True)
class Prompt:
    """A question as the run puts it to the model.

    Attributes:
        messages, tools: as the chat template gets them; empty where the rows are plain text.
        text: rendered.
        ids: its tokens, as in training.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """What two models are compared on.

    Attributes:
        origin: "validation", "test" or "fixed texts".
        prompts: of the same rows.
        texts: each with its tokens, without any that a tokenizer puts around a text.
        note: why the rows are not held-out ones, or "".
    """

    origin: str
    probes: tuple[Probe, ...]
    prompts: tuple[Prompt, ...]
    texts: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False)
    note: str = ""


def draw_sample(subject: Subject, rows: int) -> Sample:
    """Up to `rows` held-out rows of the run, evenly chosen; where there are none, fixed texts put in the same way."""
    renderer = subject.renderer
    origin, examples, tokenized, note = _held_out(subject)
    if not tokenized.rows:
        origin, examples = "fixed texts", _fixed(subject.kind, renderer)
        tokenized = tokenize(renderer, examples, subject.limit, "cut")
    numbers = np.unique(np.linspace(0, tokenized.units - 1, min(rows, tokenized.units)).round().astype(int))
    chosen = [tokenized.rows[number * tokenized.unit] for number in numbers]
    probes = [make_probe(row.ids.tolist(), np.flatnonzero(row.weights).tolist(), row.where) for row in chosen]
    whole = {row.where for row in chosen} - set(tokenized.truncated)
    asked = [examples[row.example] for row in chosen if row.where in whole] or _fixed(subject.kind, renderer)
    texts = tuple((text, tuple(renderer.encode_prompt(text))) for text in TEXTS)
    return Sample(origin, tuple(probes), tuple(_prompt(renderer, example) for example in asked), texts, note)


def _held_out(subject: Subject) -> tuple[str, Sequence[Example], Rows, str]:
    """The run's held-out rows as far as they can still be read."""
    task = subject.task
    try:
        data = read_data(task.data, task.seed)
        origin, examples = ("test", data.test) if data.test else ("validation", data.validation)
        tokenized = tokenize_once(subject.renderer, examples, subject.limit, task.data.too_long)
    except TuneryError as error:
        why = "" if subject.public else f" ({error.message})"  # it may name a folder of this machine
        note = f"the run's data cannot be read any more, so fixed texts are compared{why}"
        return "", (), Rows(), note
    note = "" if tokenized.rows else "the run has no held-out rows, so fixed texts are compared"
    return origin, examples, tokenized, note


def _fixed(kind: Kind, renderer: Renderer) -> list[Example]:
    """Rows of the run's kind that do not depend on its data."""
    labels = renderer.labels
    answers = [labels[i % len(labels)] for i in range(len(_ASKED))] if kind.labelled else _ANSWERED
    pairs = zip(_ASKED, answers, strict=True)
    return [kind.make(Place("text", number), asked, answer) for number, (asked, answer) in enumerate(pairs, start=1)]


def _prompt(renderer: Renderer, example: Example) -> Prompt:
    kind = KINDS[example.kind]
    if not kind.templated:
        text = example.prompt or example.text
        return Prompt((), (), text, tuple(renderer.encode_prompt(text, begin=True)))
    messages = kind.question(renderer, example)
    text = renderer.prompt(messages, example.tools)
    plain = tuple(renderer.plain(messages))
    return Prompt(plain, tuple(example.tools), text, tuple(renderer.encode_prompt(text)))
