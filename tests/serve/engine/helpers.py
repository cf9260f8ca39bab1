"""Small bases, adapters on disk, and questions put to an engine without a server around it."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support.shapes import tiny_model
from tests.tiny import tiny_tokenizer
from tunery.fast.adapters import apply_lora
from tunery.lora.adapter import save_adapter
from tunery.lora.attach import remove, trainable_parameters
from tunery.models.load import Base, BaseInfo
from tunery.serve.engine.backend import TokenDelta, Usage
from tunery.serve.engine.batch import BatchLimits
from tunery.serve.engine.detokenizer import Detokenizer, TextStream, TokenTexts
from tunery.serve.engine.engine import Engine
from tunery.serve.engine.running import Asked, RunningRequest
from tunery.serve.engine.sampling_params import Sampler, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
VOCABULARY = len(tiny_tokenizer())
SMALL = BatchLimits(rows=8, waiting=64, adapters=4, cache_bytes=1 << 26, prefix_bytes=1 << 22)


def tiny_base(shape: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Base:
    """A random model of a shape with the byte-level test tokenizer."""
    model = tiny_model(shape, dtype, vocab_size=VOCABULARY, **changes)
    info = BaseInfo(shape, "made in a test", "", type(model).__name__, 0, str(dtype), "cpu", None, None, "model")
    return Base(model, tiny_tokenizer(), info)


def write_adapter(model: Any, folder: Path, seed: int, size: float = 0.3, **settings: Any) -> Path:
    """An adapter folder of random tensors, large enough to change what a tiny model says; the model is left bare."""
    apply_lora(model, seed=seed, **{"rank": 4, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder)
    remove(model, "default")
    return folder


@contextlib.contextmanager
def running(base: Base, limits: BatchLimits = SMALL) -> Iterator[Engine]:
    """An engine that answers within this context."""
    engine = Engine(base, limits)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@dataclass
class Answer:
    """What came back of one request."""

    asked: Asked
    items: queue.Queue[Any] = field(default_factory=queue.Queue)
    deltas: list[TokenDelta] = field(default_factory=list)
    usage: Usage | None = None

    def wait(self, timeout: float = 60.0) -> Answer:
        """Until the end; raises what ended it."""
        while self.usage is None:
            self.take(timeout)
        return self

    def take(self, timeout: float = 60.0) -> None:
        """The next items."""
        for item in self.items.get(timeout=timeout):
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Usage):
                self.usage = item
            else:
                self.deltas.append(item)

    def text(self, index: int = 0) -> str:
        """Of a choice."""
        return "".join(delta.text for delta in self.deltas if delta.index == index)

    def tokens(self, index: int = 0) -> list[int]:
        """Of a choice's answer."""
        row = self.asked.rows[index]
        return row.tokens[len(row.prompt) :]

    def reason(self, index: int = 0) -> str | None:
        """Why a choice ended."""
        return next((d.finish_reason for d in self.deltas if d.index == index and d.finish_reason), None)


def question(
    prompt: Sequence[int],
    most: int = 12,
    sampling: SamplingParams = GREEDY,
    *,
    adapter: tuple[str, Path] | None = None,
    choices: int = 1,
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> Answer:
    """A request for a tokenised prompt, not sent yet."""
    tokenizer = tiny_tokenizer()
    texts = TokenTexts(tokenizer)
    items: queue.Queue[Any] = queue.Queue()
    asked = Asked(adapter[0] if adapter else "", adapter[1] if adapter else None, items.put)
    for index in range(choices):
        stream = TextStream(Detokenizer(tokenizer.backend_tokenizer.decode), stops)
        asked.rows.append(
            RunningRequest(
                asked, index, list(prompt), Sampler(sampling, index), stream, texts, most, frozenset(stop_ids)
            )
        )
    return Answer(asked, items)


def ask(
    engine: Engine, prompt: Sequence[int], most: int = 12, sampling: SamplingParams = GREEDY, **more: Any
) -> Answer:
    """A request that is being answered."""
    answer = question(prompt, most, sampling, **more)
    engine.submit(answer.asked)
    return answer


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], most: int = 12, stop_ids: Sequence[int] = ()) -> list[int]:
    """The most likely tokens one after another, as the model itself computes them without any cache."""
    tokens = list(prompt)
    for _ in range(most):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them a control token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
