"""The next token of each row, from its logits: penalties, bias, grammar, temperature, nucleus; and log-probabilities.

Each row draws from its own generator, one number a token, so that the same seed and request give the same answer
whatever else is being answered. Nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures below take the most likely token."""

NUCLEUS_FIRST = 512
"""A nucleus is looked for among so many of the most likely tokens before all are sorted."""


class Allowed(Protocol):
    """A grammar at one place of an answer (tunery.serve.engine.constrain.Matcher)."""

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [vocabulary], on the CPU."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, with OpenAI's names and defaults.

    Attributes:
        bias: token → number added to its logit.
        top_logprobs: so many alternatives are reported with each token; None reports nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, its log-probability before anything was changed, and the most likely tokens with theirs, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """What one row's choices depend on, besides its logits.

    Args:
        choice: number of the answer among those of one request; each draws other numbers.
        grammar: what may come next; None for anything.
    """

    def __init__(self, sampling: SamplingParams, choice: int = 0, grammar: Allowed | None = None):
        self.sampling, self.grammar = sampling, grammar
        seed = None if sampling.seed is None else f"{sampling.seed} {choice}"
        self._random = random.Random(seed)
        self._counts: dict[int, int] = {}

    def note(self, token: int) -> None:
        """The row goes on with this token."""
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1

    @property
    def changes(self) -> bool:
        """Whether `adjust` does anything."""
        return bool(self._counts or self.sampling.bias or self.grammar is not None)

    def adjust(self, logits: Tensor) -> None:
        """Change the logits [vocabulary] in place, as the request asks.

        A token that occurred c times so far loses presence_penalty + c · frequency_penalty (OpenAI's API reference).
        """
        if self._counts:
            seen = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
            logits[seen] -= self.sampling.presence_penalty + counts * self.sampling.frequency_penalty
        if self.sampling.bias:
            tokens = torch.tensor(list(self.sampling.bias), device=logits.device)
            logits[tokens] += torch.tensor(list(self.sampling.bias.values()), dtype=logits.dtype, device=logits.device)
        if self.grammar is not None:
            logits.masked_fill_(~self.grammar.allowed().to(logits.device), float("-inf"))

    def draw(self) -> float:
        """The next random number in [0, 1)."""
        return self._random.random()


@torch.inference_mode()
def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice | Exception]:
    """The next token of each row.

    Args:
        logits: [S, vocabulary], float32 or wider; changed in place.
        samplers: one per row.

    Returns:
        One entry a row: its choice, or what went wrong with it alone.
    """
    failed: dict[int, Exception] = {}
    for row in _not_finite(logits):
        failed[row] = FloatingPointError("the model's output is not a finite number")
        logits[row] = 0.0
    told = [row for row, sampler in enumerate(samplers) if sampler.sampling.top_logprobs is not None]
    shares = torch.log_softmax(logits[told], dim=-1) if told else None
    for row, sampler in enumerate(samplers):
        if sampler.changes and row not in failed:
            try:
                sampler.adjust(logits[row])
            except Exception as error:  # a grammar's, say: one row's trouble is not the others'
                failed[row] = error
    tokens = _pick(logits, samplers)
    choices: list[Choice | Exception] = [Choice(token) for token in tokens]
    if shares is not None:
        for row, choice in zip(
            told,
            log_probabilities(
                shares, [tokens[row] for row in told], [samplers[row].sampling.top_logprobs or 0 for row in told]
            ),
            strict=True,
        ):
            choices[row] = choice
    for row, error in failed.items():
        choices[row] = error
    return choices


def log_probabilities(shares: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[Choice]:
    """Choices that were made, with their log-probabilities.

    Args:
        shares: log-probabilities [S, vocabulary].
        tokens: [S].
        top: how many alternatives each shows.
    """
    chosen = shares.gather(1, torch.tensor(tokens, device=shares.device)[:, None])[:, 0].tolist()
    if not any(top):
        return [Choice(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    values, ids = shares.topk(min(max(top), shares.shape[1]))
    best = [
        tuple(zip(some[:count], of[:count], strict=True))
        for some, of, count in zip(ids.tolist(), values.tolist(), top, strict=True)
    ]
    return [Choice(*each) for each in zip(tokens, chosen, best, strict=True)]


def _not_finite(logits: Tensor) -> list[int]:
    """Rows that hold NaN or +inf, or nothing above -inf."""
    return torch.nonzero(~torch.isfinite(logits.amax(dim=-1))).flatten().tolist()


def _pick(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.sampling.greedy]
    if len(drawn) < len(samplers):
        tokens = logits.argmax(dim=-1).tolist()
    else:
        tokens = [0] * len(samplers)
    for nucleus in (False, True):
        rows = [row for row in drawn if (samplers[row].sampling.top_p < 1.0) is nucleus]
        if rows:
            mine = [samplers[row] for row in rows]
            some = logits if len(rows) == len(samplers) else logits[rows]
            for row, token in zip(rows, _draw(some, mine, nucleus), strict=True):
                tokens[row] = token
    return tokens


def _draw(logits: Tensor, samplers: Sequence[Sampler], nucleus: bool) -> list[int]:
    """Draw from softmax(logits / temperature), or from its nucleus, by inverting the cumulative distribution."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(logits.device)[:, None]

    temperature = column([sampler.sampling.temperature for sampler in samplers]).to(logits.dtype)
    number = column([sampler.draw() for sampler in samplers])
    shares = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if not nucleus:
        return _invert(shares.double(), number).tolist()
    wanted = column([sampler.sampling.top_p for sampler in samplers])
    values, ids = shares.topk(min(NUCLEUS_FIRST, shares.shape[1]))
    if bool((values.double().sum(dim=-1, keepdim=True) < wanted).any()):
        values, ids = shares.sort(dim=-1, descending=True)
    values = values.double()
    before = values.cumsum(dim=-1) - values
    outside = before >= wanted
    outside[:, 0] = False  # the most likely token stays even with top_p 0
    return ids.gather(1, _invert(values.masked_fill_(outside, 0.0), number)[:, None])[:, 0].tolist()


def _invert(shares: Tensor, number: Tensor) -> Tensor:
    """Where the cumulative sum of shares [S, n] passes number · total, [S]."""
    total = shares.cumsum(dim=-1)
    return torch.searchsorted(total, number * total[:, -1:], right=True)[:, 0].clamp_(max=shares.shape[1] - 1)
