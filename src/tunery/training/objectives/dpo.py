"""Direct preference optimisation: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.

For a prompt x with a chosen answer y_w and a rejected one y_l, the policy π (base and adapter) and the reference π_ref
(what the training starts from: the base alone, or the base with the adapter of `lora.start`),

    loss = −log σ(β [(log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))])

with log-probabilities summed over an answer's trained tokens; the mean is over all pairs of an optimizer step. The
reward of an answer is β (log π − log π_ref).

The reference is the same model with its adapter off, or with a frozen copy of the starting adapter on, run on the very
same packed sequences: nothing but that copy is kept in memory, and a resumed run needs no cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunery.config import Task
from tunery.data.batching import Row, pack
from tunery.data.prepare import Rows
from tunery.errors import ConfigError
from tunery.fast.packed_model import PackedModel
from tunery.jsonl import JsonMapping, JsonObject
from tunery.training.intervals import accuracy_interval
from tunery.training.loss import row_log_probabilities
from tunery.training.objectives.base import ReferenceObjective, StepStats, loss_metrics
from tunery.training.scoring import Scorer, Scores

LR_SCALE = 1 / 5
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
class DPO(ReferenceObjective):
    """The loss of pairs of rows, chosen and rejected side by side, divided by the number of pairs.

    Attributes:
        reference: the adapter that is active in the reference; None for the base alone.
    """

    beta: float
    reference: str | None = None

    name = "dpo"
    unit = 2
    noun = "pair"
    lr_scale = LR_SCALE
    passes = 1

    @classmethod
    def build(cls, task: Task, train: Rows, recorded: JsonMapping | None = None) -> Self:
        return cls(task.train.effective_beta, cls.reference_of(task))

    @classmethod
    def select(cls, rows: Rows) -> Rows:
        if rows.rows and rows.unit != cls.unit:
            raise ConfigError(
                "train.objective: dpo compares two answers to one prompt, and these rows are not such pairs",
                "give prompt, chosen and rejected (data.kind: preference), or leave train.objective out",
            )
        return rows

    def weight(self, rows: Sequence[Row]) -> float:
        """The number of pairs."""
        return len(rows) / 2

    def backward(self, model: PackedModel, rows: Sequence[Row], weight: float, context: object = None) -> StepStats:
        """Prompts are computed once for both answers, and once for all pairs that share them."""
        if not model.flattened:
            return self._one_by_one(model, rows, weight)
        batch = pack(rows)
        reference = self.reference_log_probabilities(model, batch, len(rows))
        judged = judge(row_log_probabilities(model, batch, len(rows)), reference, self.beta)
        torch.autograd.backward(judged.loss / weight)
        return StepStats.of(judged.loss.detach(), judged.metrics, model, [batch])

    def _one_by_one(self, model: PackedModel, rows: Sequence[Row], weight: float) -> StepStats:
        """Where only one row runs at a time, only one row's activations are kept: first the log-probabilities of all,
        which say how much each row counts, then row by row the gradient."""
        batches = [pack([row]) for row in rows]
        with torch.no_grad():
            policy = torch.cat([row_log_probabilities(model, batch, 1) for batch in batches])
        reference = torch.cat([self.reference_log_probabilities(model, batch, 1) for batch in batches])
        judged = judge(policy.requires_grad_(), reference, self.beta)
        (slopes,) = torch.autograd.grad(judged.loss / weight, policy)
        for slope, batch in zip(slopes, batches, strict=True):
            torch.autograd.backward((slope * row_log_probabilities(model, batch, 1)).sum())
        return StepStats.of(judged.loss.detach(), judged.metrics, model, batches)

    def measure(self, score: Scorer, rows: Sequence[Row]) -> tuple[float, Mapping[str, float]]:
        """The mean over the pairs."""
        return judge_scores(*self.both(score, rows), self.beta)

    def judge(self, scores: Scores, base: Scores, rows: Sequence[Row]) -> JsonObject:
        return preference_scores(scores.log_probability, base.log_probability, rows, self.beta)

    def settings(self) -> JsonObject:
        return {"beta": self.beta}

    def receipt_section(self, splits: Mapping[str, Rows]) -> JsonObject:
        """β, and for each split its pairs and the trained tokens of both answers."""
        counts = {
            name: {
                "pairs": rows.units,
                "chosen_tokens": sum(row.trained for row in rows.rows[0::2]),
                "rejected_tokens": sum(row.trained for row in rows.rows[1::2]),
            }
            for name, rows in splits.items()
        }
        return {"preference": {"beta": self.beta, **counts}}


def judge_scores(policy: np.ndarray, reference: np.ndarray, beta: float) -> tuple[float, dict[str, float]]:
    """(mean loss, mean metrics) of pairs, from float64 log-probabilities [2 · pairs] as `judge` takes them."""
    judged = judge(torch.as_tensor(policy), torch.as_tensor(reference), beta)
    pairs = len(policy) // 2
    return float(judged.loss) / pairs, {name: float(value) / pairs for name, value in judged.metrics.items()}


def preference_scores(
    scores: np.ndarray, base: np.ndarray, rows: Sequence[Row], beta: float
) -> dict[str, float | list[float]]:
    """How one side judges pairs.

    Args:
        scores: log-probabilities of the rows [2 · pairs], the chosen answer of a pair before its rejected one.
        base: those of the base model.
        beta: of the training.

    Returns:
        preference_accuracy: the share of pairs whose chosen answer is the likelier one (both answers whole, so a longer
        one has it harder), with its 95 % interval; rewards_accuracy, rewards_margin and preference_loss, from the
        rewards β · (score − base's score); loss and perplexity a token of the chosen answers, rejected_loss of the
        rejected.
    """
    likelier = int((scores[0::2] > scores[1::2]).sum())
    loss, rewards = judge_scores(scores, base, beta)
    chosen, rejected = (float(-scores[side::2].sum() / sum(row.trained for row in rows[side::2])) for side in (0, 1))
    return {
        "rewards_accuracy": rewards["rewards_accuracy"],
        "rewards_margin": rewards["rewards_margin"],
        "preference_accuracy": 2 * likelier / len(scores),
        "preference_accuracy_interval": list(accuracy_interval(likelier, len(scores) // 2)),
        "preference_loss": loss,
        **loss_metrics(chosen),
        "rejected_loss": rejected,
    }
