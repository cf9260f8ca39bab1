"""What a run minimises. The loop asks it for a step's weight, a micro-batch's gradient and the validation loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tunery.data.batching import FlatBatch, Row, flatten
from tunery.models.flat import FlatModel
from tunery.training.loss import batch_loss
from tunery.training.scoring import Scorer


@dataclass
class Sums:
    """What micro-batches add up to.

    Attributes:
        loss: summed, not yet divided by the step's weight.
        metrics: by the name in metrics.jsonl, summed in the same way.
        data_tokens, computed_tokens, trained_tokens: of their rows.
        positions: predicting positions; several rows may predict from one.
        pairs: queries and keys that see each other, summed over the layers.
    """

    loss: Tensor | float = 0.0
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    data_tokens: int = 0
    computed_tokens: int = 0
    trained_tokens: int = 0
    positions: int = 0
    pairs: int = 0

    @classmethod
    def of(
        cls, loss: Tensor, metrics: Mapping[str, Tensor | float], model: FlatModel, batches: Sequence[FlatBatch]
    ) -> Sums:
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

    def __iadd__(self, other: Sums) -> Sums:
        self.loss = self.loss + other.loss
        for name, value in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value
        self.data_tokens += other.data_tokens
        self.computed_tokens += other.computed_tokens
        self.trained_tokens += other.trained_tokens
        self.positions += other.positions
        self.pairs += other.pairs
        return self


class Objective(Protocol):
    """A loss over units of rows.

    Attributes:
        unit: neighbouring rows that belong together and are never split.
        noun: what a unit is called.
        rate_share: `learning_rate: auto` as a share of the rate for supervised training.
        passes: how often the base is run forward besides the trained pass.
    """

    @property
    def unit(self) -> int: ...
    @property
    def noun(self) -> str: ...
    @property
    def rate_share(self) -> float: ...
    @property
    def passes(self) -> int: ...

    def weight(self, rows: Sequence[Row]) -> float:
        """What the summed loss of a whole optimizer step is divided by, once."""
        ...

    def backward(self, model: FlatModel, rows: Sequence[Row], weight: float) -> Sums:
        """Add the gradient of (summed loss / weight) of one micro-batch to the parameters."""
        ...

    def measure(self, score: Scorer, rows: Sequence[Row]) -> tuple[float, Mapping[str, float]]:
        """(loss, metrics) of held-out rows, without gradients. The metrics are logged under "valid_" and their name."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the trained tokens, divided by their weight."""

    unit: int = 1
    noun: str = "row"
    rate_share: float = 1.0
    passes: int = 0

    def weight(self, rows: Sequence[Row]) -> float:
        """The trained weight of the rows."""
        return sum(float(row.weights.sum()) for row in rows)

    def backward(self, model: FlatModel, rows: Sequence[Row], weight: float) -> Sums:
        """See Objective."""
        batch = flatten(rows)
        loss = batch_loss(model, batch)
        (loss.total / weight).backward()
        return Sums.of(loss.total.detach(), {"train_token_accuracy": loss.correct}, model, [batch])

    def measure(self, score: Scorer, rows: Sequence[Row]) -> tuple[float, Mapping[str, float]]:
        """See Objective."""
        scores = score(rows)
        return scores.mean_loss, {"token_accuracy": scores.accuracy}
