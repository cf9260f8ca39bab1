"""Classification by scoring: each label's tokens are scored as the answer, and the most likely label wins.

All labels share the whole prompt, so the prefix tree computes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tunery.data.batching import Row
from tunery.data.example import Example
from tunery.data.kinds.base import Encoded
from tunery.data.kinds.classification import fitting_text
from tunery.data.prepare import make_row
from tunery.data.render import Renderer
from tunery.training.scoring import Scorer


@dataclass(frozen=True)
class LabelRows:
    """Every example with every label as its answer.

    Attributes:
        examples: those whose rows fit; indices into the examples given.
        rows: len(examples) · L rows, the labels of one example side by side.
        truth: index of each example's own label. int64 [len(examples)].
        cut: examples whose text was cut to fit; indices into the examples given.
    """

    examples: list[int]
    rows: list[Row]
    truth: np.ndarray
    cut: list[int] = field(default_factory=list)


def label_rows(renderer: Renderer, examples: Sequence[Example], limit: int, too_long: str = "cut") -> LabelRows:
    """Tokenise each example once for each label, always with the same text.

    A text that is too long is cut at its end until the longest label fits, or left out (`too_long` is "drop").
    """
    kept, rows, cut = [], [], []
    encoded = _encode(renderer, examples)
    for number, (example, variants) in enumerate(zip(examples, encoded, strict=True)):
        longest = max(range(len(variants)), key=lambda k: len(variants[k].ids))
        if len(variants[longest].ids) > limit:
            text = "" if too_long == "drop" else fitting_text(renderer, _as(example, renderer.labels[longest]), limit)
            if not text:
                continue
            cut.append(number)
            (variants,) = _encode(renderer, [replace(example, text=text)])
        kept.append(number)
        rows += variants
    truth = [renderer.labels.index(examples[i].label) for i in kept]
    return LabelRows(kept, rows, np.asarray(truth, dtype=np.int64), cut)


def _as(example: Example, label: str) -> Example:
    return replace(example, label=label)


def _encode(renderer: Renderer, examples: Sequence[Example]) -> list[list[Row]]:
    """The row of each label, for each example."""
    rendered = [renderer.render(_as(example, label))[0] for example in examples for label in renderer.labels]
    rows = [make_row(Encoded(*encoded)) for encoded in renderer.encode(rendered)]
    count = len(renderer.labels)
    return [rows[at : at + count] for at in range(0, len(rows), count)]


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


def score_labels(score: Scorer, given: LabelRows, labels: int) -> LabelScores:
    """Score every label of every example with the adapter that is active."""
    scores = score(given.rows).log_probability.reshape(-1, labels)
    true = np.arange(len(given.truth)) * labels + given.truth
    tokens = sum(given.rows[i].trained for i in true)
    return LabelScores(scores, float(-scores.reshape(-1)[true].sum() / tokens))
