"""What a run minimises. Each objective is one file beside this one, and an entry of OBJECTIVES.

The loop asks it for a step's weight, a micro-batch's gradient and the validation loss; the evaluation for what a
model's log-probabilities of held-out rows amount to.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from tunery.config import ObjectiveName, Task
from tunery.data.batching import PackedBatch, Row
from tunery.data.prepare import Rows
from tunery.fast.packed_model import PackedModel
from tunery.jsonl import JsonMapping, JsonObject
from tunery.lora.attach import using
from tunery.training.loss import row_log_probabilities
from tunery.training.scoring import Scorer, Scores

REFERENCE = "reference"
"""Name of the frozen copy of the starting adapter (`lora.start`) that objectives with a reference compare with."""


@dataclass
class StepStats:
    """What micro-batches add up to.

    Attributes:
        loss: summed, not yet divided by the step's weight.
        metrics: by the name in metrics.jsonl, summed in the same way.
        data_tokens, computed_tokens, trained_tokens: of their rows.
        positions: predicting positions; several rows may predict from one.
        pairs: queries and keys that see each other, summed over the layers.
    """

    loss: Tensor | float = 0.0
    metrics: dict[str, Tensor | float] = field(default_factory=dict[str, Tensor | float])
    data_tokens: int = 0
    computed_tokens: int = 0
    trained_tokens: int = 0
    positions: int = 0
    pairs: int = 0

    @classmethod
    def of(
        cls, loss: Tensor, metrics: Mapping[str, Tensor | float], model: PackedModel, batches: Sequence[PackedBatch]
    ) -> StepStats:
        """Of micro-batches with these sums of loss and metrics."""
        return cls(
            loss,
            dict(metrics),
            data_tokens=sum(batch.data_tokens for batch in batches),
            computed_tokens=sum(len(batch.ids) for batch in batches),
            trained_tokens=sum(len(batch.targets) for batch in batches),
            positions=sum(len(batch.sources) for batch in batches),
            pairs=sum(model.visible_pairs(batch) for batch in batches),
        )

    def __iadd__(self, other: StepStats) -> StepStats:
        self.loss = self.loss + other.loss
        for name, value in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value
        self.data_tokens += other.data_tokens
        self.computed_tokens += other.computed_tokens
        self.trained_tokens += other.trained_tokens
        self.positions += other.positions
        self.pairs += other.pairs
        return self


class Objective(ABC):
    """A loss over rows, or over units of neighbouring rows.

    Attributes:
        name: in `train.objective`.
        unit: neighbouring rows that belong together and are never split.
        noun: what a unit is called.
        lr_scale: `learning_rate: auto` in terms of the rate for supervised training.
        passes: how often the base is run forward besides the trained pass.
        has_reference: the tuned model is compared with what it starts from: the base, or the base with the adapter of
            `lora.start`, of which a frozen copy is then kept under the name REFERENCE.
    """

    name: ClassVar[ObjectiveName]
    unit: ClassVar[int] = 1
    noun: ClassVar[str] = "row"
    lr_scale: ClassVar[float] = 1.0
    passes: ClassVar[int] = 0
    has_reference: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def build(cls, task: Task, train: Rows, recorded: JsonMapping | None = None) -> Self:
        """For a task and its training rows.

        Args:
            recorded: the receipt of a finished run; what its training rows decided is taken from there, and `train` may
                be any rows.

        Raises:
            ConfigError: the settings do not go together with these rows.
        """

    @classmethod
    def select(cls, rows: Rows) -> Rows:
        """The rows of a split that this objective works on.

        Raises:
            ConfigError: it has no use for rows of this kind.
        """
        return rows

    @abstractmethod
    def weight(self, rows: Sequence[Row]) -> float:
        """What the summed loss of a whole optimizer step is divided by, once."""

    def prepare_step(self, score: Scorer, rows: Sequence[Row]) -> object:
        """What the loss of each row of a step takes from all of the step's rows, found without gradient: plain values,
        which `backward` is given with each micro-batch."""
        return None

    @abstractmethod
    def backward(self, model: PackedModel, rows: Sequence[Row], weight: float, context: object = None) -> StepStats:
        """Add the gradient of (summed loss / weight) of one micro-batch to the parameters.

        Args:
            context: of the whole step, from `prepare_step`.
        """

    @abstractmethod
    def measure(self, score: Scorer, rows: Sequence[Row]) -> tuple[float, Mapping[str, float]]:
        """(loss, metrics) of held-out rows, without gradients. The metrics are logged under "valid_" and their name."""

    @abstractmethod
    def judge(self, scores: Scores, base: Scores, rows: Sequence[Row]) -> JsonObject:
        """What a model makes of held-out rows, for evaluation.json (tunery.evaluation.record.METRICS).

        Args:
            scores: of the model that is judged.
            base: of the base model.
        """

    def settings(self) -> JsonObject:
        """Its own settings, for evaluation.json."""
        return {}

    def receipt_section(self, splits: Mapping[str, Rows]) -> JsonObject:
        """What it adds to the receipt."""
        return {}


class ReferenceObjective(Objective):
    """An objective that compares the tuned model with what it starts from.

    Attributes:
        reference: the adapter that is active in the reference; None for the base alone.
    """

    reference: str | None
    has_reference = True

    @staticmethod
    def reference_of(task: Task) -> str | None:
        """The adapter that is active in the reference of a task."""
        return None if task.lora.start is None else REFERENCE

    def both(self, score: Scorer, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """(log-probabilities of the tuned model, of the reference), float64 [rows]."""
        policy = score(rows).log_probability
        with using(score.model.model, self.reference):
            return policy, score(rows).log_probability

    @torch.no_grad()
    def reference_log_probabilities(self, model: PackedModel, batch: PackedBatch, rows: int) -> Tensor:
        """Of the rows of a batch, [rows]."""
        with using(model.model, self.reference):
            return row_log_probabilities(model, batch, rows)


def loss_metrics(loss: float) -> dict[str, float]:
    """Of a mean loss per token, in nats."""
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
