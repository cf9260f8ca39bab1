"""Direct preference optimisation: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.

For a prompt x with a chosen answer y_w and a rejected one y_l, the policy π (base and adapter) and the reference π_ref
(what the training starts from: the base alone, or the base with the adapter of `lora.start`),

    loss = −log σ(β [(log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))])

with log-probabilities summed over an answer's trained tokens; the mean is over all pairs of an optimizer step. The
reward of an answer is β (log π − log π_ref).

The reference is the same model with its adapter off, or with a frozen copy of the starting adapter on, run on the very
same flattened rows: nothing but that copy is kept in memory, and a resumed run needs no cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunery.data.batching import FlatBatch, Row, flatten
from tunery.lora.attach import using
from tunery.models.flat import FlatModel
from tunery.training.loss import row_log_probabilities
from tunery.training.objective import Sums
from tunery.training.scoring import Scorer

RATE_SHARE = 1 / 5
"""Preference training wants a lower rate than supervised: the loss can always be lowered by driving both answers away
from what the base would say. How much lower depends on the number of pairs; this lies between two rates that were
measured (docs/lab.md), and `tunery check --lr-test` tries others."""


@dataclass(frozen=True)
class Judged:
    """Of pairs: the summed loss (with gradient, if the log-probabilities have one) and the usual metrics, summed."""

    loss: Tensor
    metrics: dict[str, Tensor]


def judge(policy: Tensor, reference: Tensor, beta: float) -> Judged:
    """The loss of pairs.

    Args:
        policy, reference: log-probabilities [2 · pairs], the chosen answer of a pair before its rejected one.
    """
    rewards = beta * (policy - reference)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin = chosen - rejected
    metrics = {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "rewards_margin": margin,
        "rewards_accuracy": (margin > 0).to(margin.dtype),
    }
    summed = {name: values.detach().sum() for name, values in metrics.items()}
    return Judged(-F.logsigmoid(margin).sum(), summed)


@dataclass(frozen=True)
class Preference:
    """The loss of pairs of rows, chosen and rejected side by side, divided by the number of pairs.

    Attributes:
        reference: the adapter that is active in the reference; None for the base alone.
    """

    beta: float
    reference: str | None = None
    unit: int = 2
    noun: str = "pair"
    rate_share: float = RATE_SHARE
    passes: int = 1

    def weight(self, rows: Sequence[Row]) -> float:
        """The number of pairs."""
        return len(rows) / 2

    def backward(self, model: FlatModel, rows: Sequence[Row], weight: float) -> Sums:
        """See Objective. Prompts are computed once for both answers, and once for all pairs that share them."""
        if not model.flattened:
            return self._one_by_one(model, rows, weight)
        batch = flatten(rows)
        reference = self._reference(model, batch, len(rows))
        judged = judge(row_log_probabilities(model, batch, len(rows)), reference, self.beta)
        (judged.loss / weight).backward()
        return Sums.of(judged.loss.detach(), judged.metrics, model, [batch])

    def _one_by_one(self, model: FlatModel, rows: Sequence[Row], weight: float) -> Sums:
        """Where only one row runs at a time, only one row's activations are kept: first the log-probabilities of all,
        which say how much each row counts, then row by row the gradient."""
        batches = [flatten([row]) for row in rows]
        with torch.no_grad():
            policy = torch.cat([row_log_probabilities(model, batch, 1) for batch in batches])
        reference = torch.cat([self._reference(model, batch, 1) for batch in batches])
        judged = judge(policy.requires_grad_(), reference, self.beta)
        (slopes,) = torch.autograd.grad(judged.loss / weight, policy)
        for slope, batch in zip(slopes, batches, strict=True):
            (slope * row_log_probabilities(model, batch, 1)).sum().backward()
        return Sums.of(judged.loss.detach(), judged.metrics, model, batches)

    def measure(self, score: Scorer, rows: Sequence[Row]) -> tuple[float, Mapping[str, float]]:
        """See Objective: the mean over the pairs."""
        policy = score(rows).log_probability
        with using(score.model.model, self.reference):
            reference = score(rows).log_probability
        return judge_scores(policy, reference, self.beta)

    @torch.no_grad()
    def _reference(self, model: FlatModel, batch: FlatBatch, rows: int) -> Tensor:
        with using(model.model, self.reference):
            return row_log_probabilities(model, batch, rows)


def judge_scores(policy: np.ndarray, reference: np.ndarray, beta: float) -> tuple[float, dict[str, float]]:
    """(mean loss, mean metrics) of pairs, from float64 log-probabilities [2 · pairs] as `judge` takes them."""
    judged = judge(torch.from_numpy(policy), torch.from_numpy(reference), beta)
    pairs = len(policy) // 2
    return float(judged.loss) / pairs, {name: float(value) / pairs for name, value in judged.metrics.items()}
