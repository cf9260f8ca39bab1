"""The metrics of a fine-tuning job, as OpenAI names them in events and result files, and as metrics.jsonl does."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tunery.jsonl import JsonMapping, JsonObject

OPENAI_NAMES = {
    "train_loss": "train_loss",
    "train_token_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_token_accuracy": "valid_mean_token_accuracy",
}
"""Name in metrics.jsonl → in OpenAI's events and checkpoints. Those of preference training (rewards_…) are kept."""

COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_token_accuracy",
}
"""Column, as OpenAI names it → name in metrics.jsonl."""

RESULTS_FILENAME = "step_metrics.csv"

_TRAINING = {theirs: ours for ours, theirs in OPENAI_NAMES.items() if ours.startswith("train")}
_TRAINING |= {"train_accuracy": COLUMNS["train_accuracy"]}
_VALIDATION = {theirs: ours for ours, theirs in OPENAI_NAMES.items() if ours.startswith("valid")}
_WHOLE_VALIDATION = {f"full_{theirs}": ours for theirs, ours in _VALIDATION.items()}
"""Over the whole validation file; the plain ones may be over a batch of it."""


# --------------------------------------------------------------------------- read


@dataclass
class Curve:
    """All that is known of a job's steps.

    Attributes:
        epochs: of the job.
        total_steps: of the job; 0 while it is not known.
        points: step → name in metrics.jsonl → value. Whole validations go by "full_" and the name.
    """

    epochs: int
    total_steps: int = 0
    points: dict[int, dict[str, float]] = field(default_factory=dict)

    def take(self, data: JsonMapping) -> list[JsonObject]:
        """Take in the data of a metrics event; the lines it makes, none if it says nothing of a step."""
        step, total = data.get("step"), data.get("total_steps")
        if isinstance(total, int):
            self.total_steps = max(self.total_steps, total)
        if not isinstance(step, int) or step < 1:
            return []
        found = {
            **_pick(data, _TRAINING),
            **_pick(data, _VALIDATION),
            **{f"full_{name}": value for name, value in _pick(data, _WHOLE_VALIDATION).items()},
        }
        self.points.setdefault(step, {}).update(found)
        return self._lines_of(step, found, whole=any(name.startswith("full_") for name in found))

    def take_csv(self, content: bytes) -> None:
        """Take in a result file: what its steps lack in the events. OpenAI hands it out in base64."""
        for row in csv.DictReader(io.StringIO(_decoded(content))):
            numbers = {key: _number(value) for key, value in row.items() if key}
            step = numbers.get("step")
            if step is None or step < 1:
                continue
            point = self.points.setdefault(int(step), {})
            for name, value in (_pick(numbers, _TRAINING) | _pick(numbers, _VALIDATION)).items():
                point.setdefault(name, value)
        self.total_steps = max([self.total_steps, *self.points])

    def lines(self) -> list[JsonObject]:
        """Every line, by step. Where validations of the whole file are known, those of batches are left out."""
        whole = any("full_valid_loss" in point for point in self.points.values())
        return [line for step in sorted(self.points) for line in self._lines_of(step, self.points[step], whole=whole)]

    def _lines_of(self, step: int, point: Mapping[str, float], *, whole: bool) -> list[JsonObject]:
        head = {"step": step, "epoch": round(self.epochs * step / self.total_steps, 4)} if self.total_steps else {}
        head = head or {"step": step}
        training = {name: point[name] for name in _TRAINING.values() if name in point}
        prefix = "full_" if whole else ""
        validation = {name: point[prefix + name] for name in _VALIDATION.values() if prefix + name in point}
        parts = [part for part, key in ((training, "train_loss"), (validation, "valid_loss")) if key in part]
        return [{**head, **part} for part in parts]


def _pick(data: JsonMapping, names: Mapping[str, str]) -> dict[str, float]:
    found = {ours: _number(data.get(theirs)) for theirs, ours in names.items() if _number(data.get(theirs)) is not None}
    return {name: value for name, value in found.items() if value is not None}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _decoded(content: bytes) -> str:
    text = content.decode("utf-8-sig", errors="replace")
    if text.lstrip().startswith("step,"):
        return text
    try:
        return base64.b64decode(content, validate=True).decode("utf-8-sig", errors="replace")
    except (binascii.Error, ValueError):
        return text


# --------------------------------------------------------------------------- written


def results_csv(metrics: Iterable[JsonMapping]) -> bytes:
    """One line per step; a cell stays empty where nothing was measured.

    Args:
        metrics: the lines of metrics.jsonl.
    """
    steps: dict[int, JsonObject] = {}
    for line in metrics:
        if "step" in line:
            steps.setdefault(line["step"], {}).update(line)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step in sorted(steps):
        writer.writerow([steps[step].get(name, "") for name in COLUMNS.values()])
    return text.getvalue().encode()
