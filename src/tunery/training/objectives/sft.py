"""Supervised fine-tuning: the cross-entropy of each trained token, given all tokens before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch

from tunery.config import Task
from tunery.data.batching import Row, pack
from tunery.data.prepare import Rows
from tunery.fast.packed_model import PackedModel
from tunery.jsonl import JsonMapping, JsonObject
from tunery.training.loss import batch_loss
from tunery.training.objectives.base import Objective, StepStats, loss_metrics
from tunery.training.scoring import Scorer, Scores


class CrossEntropy(Objective):
    """The mean over the trained tokens of an optimizer step, by their weight."""

    name = "sft"

    @classmethod
    def build(cls, task: Task, train: Rows, recorded: JsonMapping | None = None) -> Self:
        return cls()

    @classmethod
    def select(cls, rows: Rows) -> Rows:
        """Without answers that are there to be avoided, which count as dropped."""
        if all(row.desirable is None for row in rows.rows):
            return rows
        reason = "an answer to avoid is not trained (train.objective: sft)"
        kept = [row for row in rows.rows if row.desirable]
        dropped = [*rows.dropped, *((row.where, reason) for row in rows.rows if not row.desirable)]
        return replace(rows, rows=kept, unit=1, dropped=dropped)

    def weight(self, rows: Sequence[Row]) -> float:
        """The weight of the rows' trained tokens."""
        return sum(float(row.weights.sum()) for row in rows)

    def backward(self, model: PackedModel, rows: Sequence[Row], weight: float, context: object = None) -> StepStats:
        batch = pack(rows)
        loss = batch_loss(model, batch)
        torch.autograd.backward(loss.total / weight)
        return StepStats.of(loss.total.detach(), {"train_token_accuracy": loss.correct}, model, [batch])

    def measure(self, score: Scorer, rows: Sequence[Row]) -> tuple[float, Mapping[str, float]]:
        scores = score(rows)
        return scores.mean_loss, {"token_accuracy": scores.accuracy}

    def judge(self, scores: Scores, base: Scores, rows: Sequence[Row]) -> JsonObject:
        return {**loss_metrics(scores.mean_loss), "token_accuracy": scores.accuracy}


CROSS_ENTROPY = CrossEntropy()
