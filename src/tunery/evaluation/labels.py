"""Classification by scoring: each label's tokens are scored as the answer, and the most likely label wins.

All labels share the whole prompt, so the prefix tree computes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tunery.data.batching import Row
from tunery.data.example import Example
from tunery.data.prepare import tokenize
from tunery.data.render import Renderer
from tunery.models.flat import FlatModel
from tunery.training.loss import score_rows


@dataclass(frozen=True)
class LabelRows:
    """Every example with every label as its answer.

    Attributes:
        examples: those whose rows fit; indices into the examples given.
        rows: len(examples) · L rows, the labels of one example side by side.
        truth: index of each example's own label. int64 [len(examples)].
    """

    examples: list[int]
    rows: list[Row]
    truth: np.ndarray


def label_rows(renderer: Renderer, examples: Sequence[Example], limit: int) -> LabelRows:
    """Tokenise each example once for each label; one that does not fit with every label is left out."""
    labels = renderer.labels
    variants = [replace(example, label=label) for example in examples for label in labels]
    found: dict[int, Row] = {row.example: row for row in tokenize(renderer, variants, limit, "cut").rows}
    whole = [i for i in range(len(examples)) if all(i * len(labels) + k in found for k in range(len(labels)))]
    rows = [found[i * len(labels) + k] for i in whole for k in range(len(labels))]
    truth = [labels.index(examples[i].label) for i in whole]
    return LabelRows(whole, rows, np.asarray(truth, dtype=np.int64))


@dataclass(frozen=True)
class LabelScores:
    """What a model says of label rows.

    Attributes:
        log_probability: of each label as the answer, end-of-turn token included. float64 [n, L].
        loss: mean loss per trained token of the true answers.
    """

    log_probability: np.ndarray
    loss: float

    @property
    def predicted(self) -> np.ndarray:
        """The most likely label of each example. int64 [n]."""
        return self.log_probability.argmax(axis=1)

    @property
    def probability(self) -> np.ndarray:
        """Shares among the labels alone. float64 [n, L]."""
        shifted = np.exp(self.log_probability - self.log_probability.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)


def score_labels(model: FlatModel, given: LabelRows, labels: int) -> LabelScores:
    """Score every label of every example with the adapter that is active."""
    scores = score_rows(model, given.rows).reshape(-1, labels)
    true = np.arange(len(given.truth)) * labels + given.truth
    tokens = sum(given.rows[i].trained for i in true)
    return LabelScores(scores, float(-scores.reshape(-1)[true].sum() / tokens))
