"""Preference training from a task file to a run directory, on a tiny model: what a person would see and rely on."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tunery
from tunery import show
from tunery.api import learning_rate_test
from tunery.console import Console
from tunery.errors import CheckpointError, ConfigError, StoppedError
from tunery.evaluation.chat import Conversation

QUIET = Console(quiet=True)
THINGS = ("film", "answer", "day", "system", "user", "best")


def pair(number: int) -> dict[str, Any]:
    thing = THINGS[number % len(THINGS)]
    return {
        "prompt": f"how is {thing} {number}?",
        "chosen": f"the {thing} is good",
        "rejected": f"a dull {thing}, the best of films",
    }


@pytest.fixture
def project(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task and 48 pairs in which the better answer can be told."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(pair(number)) + "\n" for number in range(48)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "task.yaml").write_text(
        f"name: taste\nmodel: {base_folder}\ndata:\n  train: rows.jsonl\n  validation: 12\n  system: be kind\n"
        "lora:\n  rank: 4\ntrain:\n  epochs: 3\n  batch_size: 6\n  learning_rate: 0.005\n  precision: float32\n"
        "evaluate:\n  generate_rows: 3\n  samples: 2\n  max_new_tokens: 8\n"
    )
    return tmp_path


class Interrupting(Console):
    """Sends a signal after a step."""

    def __init__(self, step: int):
        super().__init__(quiet=True)
        self.step = step

    def log(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.step and "train_loss" in line:
            os.kill(os.getpid(), signal.SIGINT)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_the_margin_on_held_out_pairs_rises_and_everything_is_reported(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tunery.train("task.yaml", progress=QUIET)
    lines = lines_of(run.path)
    steps = [line for line in lines if "train_loss" in line]
    checks = [line for line in lines if "valid_loss" in line]
    assert steps[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards_margin"] == pytest.approx(0, abs=1e-4)
    for line in steps:
        assert line["rewards_margin"] == pytest.approx(line["rewards_chosen"] - line["rewards_rejected"], abs=1e-4)
        assert 0 <= line["rewards_accuracy"] <= 1
    assert checks[-1]["valid_rewards_margin"] > 1
    assert checks[-1]["valid_rewards_margin"] > checks[0]["valid_rewards_margin"]
    assert checks[-1]["valid_rewards_accuracy"] == 1
    assert checks[-1]["valid_loss"] < 0.3

    result = json.loads((run.path / "evaluation.json").read_text())
    kept = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    assert len(kept) == 12
    assert all(row["expected"].startswith("the ") and row["rejected"].startswith("a dull ") for row in kept)
    assert sum("tuned" in row for row in kept) == 3
    likelier = [row["tuned_log_probability"] > row["tuned_rejected_log_probability"] for row in kept]
    assert sum(likelier) / 12 == result["tuned"]["preference_accuracy"]
    if not all(likelier):
        assert "ranks the wrong way round" in (run.path / "report.html").read_text()
    assert (result["kind"], result["rows"], result["beta"]) == ("preference", 12, 0.1)
    base, tuned = result["base"], result["tuned"]
    assert (base["rewards_margin"], base["preference_loss"]) == (0, pytest.approx(math.log(2)))
    assert "rewards_accuracy" not in base
    assert tuned["rewards_accuracy"] == 1
    assert tuned["rewards_margin"] == pytest.approx(checks[-1]["valid_rewards_margin"], rel=1e-4)
    assert tuned["preference_accuracy"] >= base["preference_accuracy"]
    assert tuned["rejected_loss"] > base["rejected_loss"]
    assert result["generated_rows"] == 3
    assert set(result["samples"][0]) == {"where", "prompt", "reference", "rejected", "base", "tuned"}
    assert result["samples"][0]["reference"].endswith("is good")
    assert result["samples"][0]["rejected"].startswith("a dull")

    receipt = run.receipt
    assert receipt["data"]["kind"] == "preference"
    assert (receipt["data"]["train_rows"], receipt["data"]["validation_rows"]) == (36, 12)
    assert receipt["preference"]["beta"] == 0.1
    trained = receipt["preference"]["train"]
    assert trained["pairs"] == 36
    assert 0 < trained["chosen_tokens"] < trained["rejected_tokens"]
    assert receipt["tokens"]["trained"] == 3 * (trained["chosen_tokens"] + trained["rejected_tokens"])
    assert receipt["tokens"]["computed"] < 0.7 * receipt["tokens"]["data"]  # prompts are shared
    assert receipt["tokens"]["end_of_turn_trained"]
    assert receipt["reload"]["ok"]
    assert receipt["training"]["steps"] == 18

    page = (run.path / "report.html").read_text()
    said = "The training favours the preferred answer in 100.0% of 12 held-out pairs"
    shown = ("Reward margin", "Rewards of preferred and rejected", "Preferred is likelier", "<h4>Rejected</h4>")
    for words in (said, *shown):
        assert words in page
    card = (run.path / "adapter" / "README.md").read_text()
    assert "same 12 held-out pairs" in card
    assert "apply_chat_template" in card
    show.run(run)
    printed = capsys.readouterr().out
    for words in ("12 held-out pairs", "reward margin", "36 trained, 12 for validation"):
        assert words in printed


def test_interrupting_and_resuming_gives_the_same_adapter_bit_for_bit(project: Path) -> None:
    settings = ["lora.dropout=0.1", "train.micro_batch_size=2", "evaluate.enabled=false"]
    whole = tunery.train("task.yaml", ["name=whole", *settings], progress=QUIET)
    for step in (4, 11):
        with pytest.raises(StoppedError):
            tunery.train("task.yaml", ["name=parts", *settings], progress=Interrupting(step))
    resumed = tunery.train("task.yaml", ["name=parts", *settings], progress=QUIET)
    assert resumed.receipt["training"]["resumed_from"] == [4, 11]
    a, b = adapter(whole.path), adapter(resumed.path)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    rewards = [[m["rewards_margin"] for m in lines_of(r.path) if "rewards_margin" in m] for r in (whole, resumed)]
    assert rewards[0] == rewards[1]


def test_micro_batches_and_recomputed_activations_leave_the_update(project: Path) -> None:
    common = ["train.max_steps=4", "evaluate.enabled=false"]
    plain = tunery.train("task.yaml", ["name=a", *common], progress=QUIET)
    for name, more in (("b", "train.micro_batch_size=1"), ("c", "train.gradient_checkpointing=true")):
        other = tunery.train("task.yaml", [f"name={name}", more, *common], progress=QUIET)
        for key, tensor in adapter(plain.path).items():
            assert torch.allclose(tensor, adapter(other.path)[key], rtol=1e-3, atol=1e-5), key


def test_another_beta_is_another_run(project: Path) -> None:
    with pytest.raises(StoppedError):
        tunery.train("task.yaml", progress=Interrupting(3))
    with pytest.raises(CheckpointError, match=r"train\.beta: None → 0\.5"):
        tunery.train("task.yaml", ["train.beta=0.5"], progress=QUIET)
    run = tunery.train("task.yaml", ["name=firm", "train.beta=0.5", "train.max_steps=2"], progress=QUIET)
    assert run.receipt["preference"]["beta"] == 0.5
    assert run.evaluation is not None
    assert run.evaluation["beta"] == 0.5


def test_beta_for_another_kind_and_out_of_range_is_refused(project: Path) -> None:
    for value in ("0", "2.5", "-1"):
        with pytest.raises(ConfigError, match=r"train\.beta"):
            tunery.check("task.yaml", [f"train.beta={value}"])
    with pytest.raises(ConfigError, match=r"train\.beta has no meaning for kind chat"):
        tunery.check("task.yaml", ["train.beta=0.2", "data.kind=chat"])
    (project / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "r", "completion": "b"}\n' * 9)
    found = ["train.beta=0.2", "data.system=null", "data.validation=null"]
    for work in (tunery.check, tunery.train):
        with pytest.raises(ConfigError, match=r"train\.beta has no meaning for kind completion"):
            work("task.yaml", found)


def test_check_shows_both_answers_with_their_trained_tokens(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tunery.check("task.yaml", samples=1)
    assert result["data"]["train_rows"] == 36
    assert (result["training"]["steps"], result["training"]["unit"]) == (18, "pair")
    first, second = result["samples"]
    assert [on for _, on in first] == [False, True, False]
    assert first[0] == second[0]
    assert first[1][0].endswith("is good<|im_end|>")
    assert second[1][0].startswith("a dull")
    show.check(result)
    printed = capsys.readouterr().out
    assert ", chosen" in printed
    assert ", rejected" in printed
    assert "18 steps of 6 pairs" in printed


def test_the_rate_left_to_auto_is_below_that_of_supervised_training(project: Path) -> None:
    rate = tunery.check("task.yaml", ["train.learning_rate=auto"])["training"]["learning_rate"]
    assert rate == pytest.approx(1e-3 / 5)


def test_other_pairs_can_be_measured_and_the_model_talked_to(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tunery.train("task.yaml", ["evaluate.enabled=false"], progress=QUIET)
    more = [pair(n) | {"prompt": f"and {n}?"} for n in range(5)]
    (project / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    result = tunery.evaluate(run.path, "more.jsonl", progress=QUIET)
    assert (result["rows"], result["split"]) == (5, "more.jsonl")
    assert result["tuned"]["rewards_margin"] > 0
    assert (run.path / "evaluation-more.json").exists()
    again = tunery.evaluate(run.path, progress=QUIET)
    assert again["rows"] == 12
    monkeypatch.setattr(sys, "stdin", io.StringIO("how is film 3?\nand now?\n/quit\n"))
    talk = Conversation(run.load(), sampling={"max_new_tokens": 6})
    talk.run()
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2  # it remembers


def test_early_stopping_and_the_rate_test_work_on_pairs(project: Path) -> None:
    stopped = tunery.train(
        "task.yaml",
        [
            "train.early_stopping_patience=1",
            "train.early_stopping_threshold=5",
            "train.eval_steps=2",
            "evaluate.enabled=false",
        ],
        progress=QUIET,
    )
    assert stopped.receipt["training"]["stopped"] == "early stopping"
    curve = learning_rate_test("task.yaml", steps=8, progress=QUIET)
    assert curve.losses[0] == pytest.approx(math.log(2), abs=1e-3)


def test_openais_form_trains_as_well(project: Path) -> None:
    def openai(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "input": {"messages": [{"role": "user", "content": row["prompt"]}]},
            "preferred_output": [{"role": "assistant", "content": row["chosen"]}],
            "non_preferred_output": [{"role": "assistant", "content": row["rejected"]}],
        }

    plain = tunery.train("task.yaml", ["name=plain", "train.max_steps=2", "evaluate.enabled=false"], progress=QUIET)
    (project / "rows.jsonl").write_text("".join(json.dumps(openai(pair(n))) + "\n" for n in range(48)))
    other = tunery.train("task.yaml", ["name=other", "train.max_steps=2", "evaluate.enabled=false"], progress=QUIET)
    a, b = adapter(plain.path), adapter(other.path)
    assert all(torch.equal(a[name], b[name]) for name in a)
