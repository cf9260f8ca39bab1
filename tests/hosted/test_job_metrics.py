"""A job's metrics, wherever the server tells them, as lines of metrics.jsonl."""

from __future__ import annotations

import base64

from tunery.openai_api.job_metrics import Curve


def test_events_make_training_and_validation_lines() -> None:
    curve = Curve(epochs=2)
    assert curve.take({}) == []
    assert curve.take({"message": "no step"}) == []
    first = curve.take({"step": 1, "total_steps": 10, "train_loss": 0.5, "train_mean_token_accuracy": 0.25})
    assert first == [{"step": 1, "epoch": 0.2, "train_loss": 0.5, "train_token_accuracy": 0.25}]
    both = curve.take(
        {"step": 5, "total_steps": 10, "train_loss": 0.4, "valid_loss": 0.6, "valid_mean_token_accuracy": 0.3}
    )
    assert both == [
        {"step": 5, "epoch": 1.0, "train_loss": 0.4},
        {"step": 5, "epoch": 1.0, "valid_loss": 0.6, "valid_token_accuracy": 0.3},
    ]
    assert curve.lines() == [*first, *both]


def test_a_validation_of_the_whole_file_stands_in_for_those_of_batches() -> None:
    curve = Curve(epochs=1)
    curve.take({"step": 1, "total_steps": 2, "train_loss": 0.9, "valid_loss": 0.1})
    curve.take({"step": 2, "total_steps": 2, "train_loss": 0.8, "valid_loss": 0.2, "full_valid_loss": 0.5})
    assert [line for line in curve.lines() if "valid_loss" in line] == [{"step": 2, "epoch": 1.0, "valid_loss": 0.5}]


def test_what_is_no_number_is_left_out() -> None:
    curve = Curve(epochs=1)
    curve.take({"step": 1, "total_steps": 2, "train_loss": float("nan"), "train_mean_token_accuracy": True})
    curve.take({"step": 2, "total_steps": 2, "train_loss": "0.5", "valid_loss": None})
    curve.take({"step": 0, "train_loss": 1.0})
    assert curve.lines() == [{"step": 2, "epoch": 1.0, "train_loss": 0.5}]


def test_a_result_file_fills_in_the_steps_that_no_event_told() -> None:
    table = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,0.9,0.5,,\n2,0.7,0.6,0.8,0.55\n"
    for content in (table.encode(), base64.b64encode(table.encode())):
        curve = Curve(epochs=1)
        curve.take({"step": 2, "train_loss": 0.71})
        curve.take_csv(content)
        assert curve.lines() == [
            {"step": 1, "epoch": 0.5, "train_loss": 0.9, "train_token_accuracy": 0.5},
            {"step": 2, "epoch": 1.0, "train_loss": 0.71, "train_token_accuracy": 0.6},
            {"step": 2, "epoch": 1.0, "valid_loss": 0.8, "valid_token_accuracy": 0.55},
        ]
    curve.take_csv(b"\xff\xfe no table at all")
    assert len(curve.lines()) == 3
