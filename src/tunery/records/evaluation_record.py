"""evaluation.json: base vs. tuned on held-out rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunery.config import KindName
from tunery.records.typed_record import Record

VERSION = 1


class LabelMetrics(Record):
    """Of one label. A ratio with nothing below the line is 0."""

    precision: float = Field(description="right among the rows given this label")
    recall: float = Field(description="right among the rows that have this label")
    f1: float = Field(description="harmonic mean of both")
    support: int = Field(description="rows that have this label")


class Metrics(Record):
    """Of one model; which there are depends on the kind of the rows and the objective of the training. Lists of two are
    95 % intervals."""

    rewards_accuracy: float | None = Field(
        default=None, description="fraction in which the better answer's reward is higher"
    )
    rewards_accuracy_interval: list[float] | None = Field(default=None, description="of rewards_accuracy")
    rewards_margin: float | None = Field(default=None, description="mean reward of good answers minus that of bad ones")
    preference_accuracy: float | None = Field(default=None, description="pairs whose preferred answer is likelier")
    preference_accuracy_interval: list[float] | None = Field(default=None, description="of preference_accuracy")
    preference_loss: float | None = Field(default=None, description="the objective's, on pairs")
    loss: float | None = Field(default=None, description="per trained token, in nats")
    perplexity: float | None = Field(default=None, description="exp(loss)")
    rejected_loss: float | None = Field(default=None, description="loss of the rejected answers")
    token_accuracy: float | None = Field(default=None, description="fraction of trained tokens ranked first")
    accuracy: float | None = Field(default=None, description="fraction of rows with the right label")
    accuracy_interval: list[float] | None = Field(default=None, description="of accuracy")
    macro_f1: float | None = Field(default=None, description="mean F1 of the labels that occur")
    weighted_f1: float | None = Field(default=None, description="the same, weighted by support")
    per_label: dict[str, LabelMetrics] | None = Field(default=None, description="label → its metrics")
    confusion: list[list[int]] | None = Field(default=None, description="rows: true label, columns: predicted label")
    unlabelled: int | None = Field(default=None, description="generated answers that name no label")
    chrf: float | None = Field(default=None, description="of generated answers against the reference, 0 to 100")
    bleu: float | None = Field(default=None, description="of generated answers against the reference, 0 to 100")
    distinct_1: float | None = Field(default=None, description="different words among all words generated")
    distinct_2: float | None = Field(default=None, description="different word pairs among all words generated")
    mean_words: float | None = Field(default=None, description="of a generated answer")


class AnsweringSection(Record):
    """How a model on a server answered."""

    median_seconds: float = Field(description="of an answer, network included")
    cut: int = Field(description="answers cut at the longest length")
    prompt_tokens: int = Field(description="as the server counts them")
    completion_tokens: int = Field(description="as the server counts them")


class EvaluationSample(Record):
    """A row with both answers."""

    where: str = Field(description="file:line")
    prompt: str = Field(description="what was asked")
    reference: str = Field(description="the answer in the data")
    base: str = Field(description="answer of the base")
    tuned: str = Field(description="answer of the tuned model")
    rejected: str | None = Field(default=None, description="the worse answer in the data")


class Evaluation(Record):
    """What both models made of the same rows."""

    def _repr_html_(self) -> str:
        """In a notebook: the metrics of both beside each other."""
        lines = [
            f"<table><thead><tr><th>{self.rows:,} held-out {self.unit or 'row'}s</th><th>base</th><th>tuned</th></tr>"
        ]
        for key in Metrics.model_fields:
            pair = [getattr(side, key) for side in (self.base, self.tuned)]
            if any(isinstance(value, float | int) for value in pair):
                cells = "".join(f"<td>{value:.4g}</td>" if value is not None else "<td>–</td>" for value in pair)
                lines.append(f"<tr><th>{key.replace('_', ' ')}</th>{cells}</tr>")
        return "".join([*lines[:1], "</thead><tbody>", *lines[1:], "</tbody></table>"])

    version: int = Field(default=VERSION, description="of this format")
    kind: KindName = Field(description="of the rows (data.kind)")
    objective: str = Field(default="", description="that the run was trained with (train.objective)")
    unit: str = Field(default="", description="what is counted: row or pair")
    split: str = Field(description="validation, test, or the name of a file")
    by: Literal["generation"] | None = Field(default=None, description="generation: judged by answers alone")
    rows: int = Field(description="rows (or pairs) measured")
    left_out: int = Field(default=0, description="rows that could not be measured")
    generated_rows: int | None = Field(default=None, description="rows answered by generating")
    labels: list[str] | None = Field(default=None, description="of a classification, in order")
    base: Metrics = Field(description="metrics of the base")
    tuned: Metrics = Field(description="metrics of the tuned model")
    samples: list[EvaluationSample] = Field(description="rows with both answers, for a person")
    seconds: float | None = Field(default=None, description="that it took")
    beta: float | None = Field(default=None, description="of objectives that compare answers")
    desirable_weight: float | None = Field(default=None, description="of KTO")
    undesirable_weight: float | None = Field(default=None, description="of KTO")
    answering: dict[str, AnsweringSection] | None = Field(default=None, description="side → how a server answered")
