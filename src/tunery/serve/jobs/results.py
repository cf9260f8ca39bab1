"""The result file of a job: its numbers step by step, as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from tunery.jsonl import JsonMapping, JsonObject

COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_token_accuracy",
}
"""Column, as OpenAI names it → name in metrics.jsonl."""

FILENAME = "step_metrics.csv"


def results_csv(metrics: Iterable[JsonMapping]) -> bytes:
    """A line a step; a cell stays empty where nothing was measured.

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
