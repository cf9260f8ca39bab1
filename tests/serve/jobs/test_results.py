"""The result file of a job."""

from __future__ import annotations

import csv

from tunery.openai_api.job_metrics import results_csv


def test_the_table_has_openais_columns_a_line_a_step_and_empty_cells() -> None:
    metrics = [
        {"step": 1, "train_loss": 2.5, "train_token_accuracy": 0.25, "seconds": 1.0},
        {"step": 2, "train_loss": 2.0, "train_token_accuracy": 0.5},
        {"step": 2, "valid_loss": 2.25, "valid_token_accuracy": 0.4},
    ]
    lines = results_csv(metrics).decode().splitlines()
    assert lines == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,2.5,0.25,,",
        "2,2.0,0.5,2.25,0.4",
    ]
    assert next(csv.DictReader(lines))["train_accuracy"] == "0.25"
    assert results_csv([]).decode().splitlines() == lines[:1]
