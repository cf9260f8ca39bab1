"""Kahneman-Tversky optimisation: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1.

Of an answer y to a prompt x it is only known whether it is desirable. With the policy π (base and adapter), the
reference π_ref (what the training starts from) and r(x, y) = log π(y|x) − log π_ref(y|x), summed over the answer's
trained tokens,

    z₀ = max(0, mean of r(x_i, y_{i+1}) over the rows of the step)
    v(x, y) = λ_D σ(β (r(x, y) − z₀)) if y is desirable, else λ_U σ(β (z₀ − r(x, y)))
    loss = mean of λ_y − v(x, y) over the rows of the step

z₀ estimates the divergence of the policy from the reference by answers that belong to other prompts: each row's prompt
with the answer of the row after it (the last one's with that of the first). No gradient flows through it. It is of the
whole optimizer step, found before its gradient, so the update does not depend on micro-batches or workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tunery.config import Task
from tunery.data.batching import Row, pack
from tunery.data.prepare import Rows
from tunery.errors import ConfigError
from tunery.fast.packed_model import PackedModel
from tunery.jsonl import JsonMapping, JsonObject
from tunery.training.loss import row_log_probabilities
from tunery.training.objectives.base import ReferenceObjective, StepStats, loss_metrics
from tunery.training.objectives.dpo import LR_SCALE
from tunery.training.scoring import Scorer, Scores


@dataclass(frozen=True)
class KTO(ReferenceObjective):
    """The loss of single answers, divided by their number.

    Attributes:
        desirable_weight, undesirable_weight: λ_D and λ_U.
        reference: the adapter that is active in the reference; None for the base alone.
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: str | None = None

    name = "kto"
    lr_scale = LR_SCALE  # as DPO: no rate of its own was measured
    passes = 3  # the reference of the rows, and both models on those with another row's answer

    @classmethod
    def build(cls, task: Task, train: Rows, recorded: JsonMapping | None = None) -> Self:
        reference = cls.reference_of(task)
        if recorded is not None:
            known = recorded["kto"]
            return cls(known["beta"], known["desirable_weight"], known["undesirable_weight"], reference)
        config, good = task.train, sum(bool(row.desirable) for row in train.rows)
        bad = len(train.rows) - good
        if not good or not bad:
            which = "good" if bad else "bad"
            raise ConfigError(
                f"train.objective: kto needs good and bad answers, and no training row has a {which} one",
                "add some, or train on good answers alone with train.objective: sft",
            )
        if config.batch_size < 2:
            raise ConfigError("train.batch_size: kto compares the rows of a step, so it needs at least 2")
        weights = (config.desirable_weight, config.undesirable_weight)
        balanced = (max(1.0, bad / good), max(1.0, good / bad))  # both sides together weigh the same (eq. 9)
        desirable, undesirable = (
            auto if asked == "auto" else asked for asked, auto in zip(weights, balanced, strict=True)
        )
        return cls(config.effective_beta, desirable, undesirable, reference)

    @classmethod
    def select(cls, rows: Rows) -> Rows:
        if any(row.desirable is None for row in rows.rows):
            raise ConfigError(
                "train.objective: kto learns from answers that are marked good or bad, and these rows are not",
                "give a label of true or false beside prompt and completion (data.kind: feedback), or leave "
                "train.objective out",
            )
        return replace(rows, unit=1)

    def weight(self, rows: Sequence[Row]) -> float:
        """The number of rows."""
        return float(len(rows))

    def prepare_step(self, score: Scorer, rows: Sequence[Row]) -> float:
        """z₀. A single row has no other's answer: then it is 0."""
        if len(rows) < 2:
            return 0.0
        policy, reference = self.both(score, mismatched(rows))
        return max(0.0, float((policy - reference).mean()))

    def backward(self, model: PackedModel, rows: Sequence[Row], weight: float, context: object = None) -> StepStats:
        assert context is None or isinstance(context, float)  # of prepare_step
        z0, stats = context or 0.0, StepStats()
        for together in [rows] if model.flattened else [[row] for row in rows]:
            batch = pack(together)
            reference = self.reference_log_probabilities(model, batch, len(together))
            policy = row_log_probabilities(model, batch, len(together))
            loss, metrics = self._losses(policy, reference, together, z0)
            torch.autograd.backward(loss / weight)
            stats += StepStats.of(loss.detach(), metrics, model, [batch])
        return stats

    def _losses(
        self, policy: Tensor, reference: Tensor, rows: Sequence[Row], z0: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(summed loss, summed metrics) of rows. policy, reference: log-probabilities [rows]."""
        good = [bool(row.desirable) for row in rows]
        weights = policy.new_tensor([self.desirable_weight if g else self.undesirable_weight for g in good])
        margin = policy.new_tensor([1.0 if g else -1.0 for g in good]) * (policy - reference - z0)
        loss = (weights * torch.sigmoid(-self.beta * margin)).sum()  # λ − λ σ(x) = λ σ(−x)
        right = (margin.detach() > 0).to(policy.dtype)
        return loss, {"rewards_accuracy": right.sum(), "kl": torch.full_like(right, z0).sum()}

    def measure(self, score: Scorer, rows: Sequence[Row]) -> tuple[float, Mapping[str, float]]:
        """The mean over the rows, with a z₀ of all of them together."""
        z0 = self.prepare_step(score, rows)
        policy, reference = self.both(score, rows)
        loss, metrics = self._losses(torch.as_tensor(policy), torch.as_tensor(reference), rows, z0)
        means = {name: float(value) / len(rows) for name, value in metrics.items()}
        good = _good(rows)
        if good.any() and not good.all():
            means["rewards_margin"] = _margin(self.beta * (policy - reference), good)
        return float(loss) / len(rows), means

    def judge(self, scores: Scores, base: Scores, rows: Sequence[Row]) -> JsonObject:
        """`rewards_accuracy` is the share of all pairs of a good and a bad row in which the good one has the higher
        reward (the area under the ROC curve)."""
        good = _good(rows)
        found: JsonObject = {}
        if good.any() and not good.all():
            rewards = self.beta * (scores.log_probability - base.log_probability)
            share = favoured(rewards[good], rewards[~good])
            found["rewards_accuracy"] = share
            found["rewards_accuracy_interval"] = list(favoured_interval(share, int(good.sum()), int((~good).sum())))
            found["rewards_margin"] = _margin(rewards, good)
        for name, side in (("loss", good), ("rejected_loss", ~good)):
            if side.any():
                tokens = sum(row.trained for row, chosen in zip(rows, side, strict=True) if chosen)
                loss = float(-scores.log_probability[side].sum()) / tokens
                found |= loss_metrics(loss) if name == "loss" else {name: loss}
        return found

    def settings(self) -> JsonObject:
        return {
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }

    def receipt_section(self, splits: Mapping[str, Rows]) -> JsonObject:
        """The settings, and for each split how many answers are good and bad."""
        counts = {}
        for name, rows in splits.items():
            good = sum(bool(row.desirable) for row in rows.rows)
            counts[name] = {"desirable": good, "undesirable": len(rows.rows) - good}
        return {"kto": {**self.settings(), **counts}}


def _good(rows: Sequence[Row]) -> np.ndarray:
    """Which answers are desirable, bool [rows]."""
    return np.asarray([bool(row.desirable) for row in rows])


def _margin(rewards: np.ndarray, good: np.ndarray) -> float:
    return float(rewards[good].mean() - rewards[~good].mean())


def mismatched(rows: Sequence[Row]) -> list[Row]:
    """Each row's prompt with the answer of the row after it, none longer than the longest of the rows: what is too much
    goes off the front of the prompt."""
    longest = max(len(row.ids) for row in rows)
    starts = [int(np.flatnonzero(row.weights)[0]) for row in rows]
    found: list[Row] = []
    for number, row in enumerate(rows):
        other = rows[(number + 1) % len(rows)]
        answer, start = slice(starts[(number + 1) % len(rows)], None), starts[number]
        first = max(0, start + len(other.ids[answer]) - longest)
        first = min(first, start - 1)  # a token must stand before the answer
        ids = np.concatenate([row.ids[first:start], other.ids[answer]])
        weights = np.concatenate([np.zeros(start - first, np.float32), other.weights[answer]])
        found.append(Row(ids, weights, row.where, row.example))
    return found


def favoured(good: np.ndarray, bad: np.ndarray) -> float:
    """The share of all pairs in which the good one's value is higher; ties count half (Mann and Whitney 1947)."""
    ordered = np.sort(bad)
    below = np.searchsorted(ordered, good, side="left")
    upto = np.searchsorted(ordered, good, side="right")
    return float((below + upto).sum() / (2 * len(good) * len(bad)))


def favoured_interval(share: float, good: int, bad: int) -> tuple[float, float]:
    """The 95 % interval of `favoured` (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747)."""
    both_good, both_bad = share / (2 - share), 2 * share * share / (1 + share)
    variance = share * (1 - share) + (good - 1) * (both_good - share**2) + (bad - 1) * (both_bad - share**2)
    half = 1.959963984540054 * math.sqrt(max(0.0, variance / (good * bad)))
    return max(0.0, share - half), min(1.0, share + half)
