"""KTO from a task file to a run directory, on a tiny model: what a person would see and rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tunery
from tests.test_preference_run import QUIET, THINGS, Interrupting, adapter
from tunery import show
from tunery.errors import ConfigError, StoppedError
from tunery.evaluation.chat import Conversation


@pytest.fixture
def project(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task and 60 answers, of which the good ones can be told."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(60):
        thing, good = THINGS[number % len(THINGS)], number % 3 != 0
        answer = f"the {thing} is good" if good else f"a dull {thing}, the best of films"
        rows.append({"prompt": f"how is {thing} {number}?", "completion": answer, "label": good})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"name: taste\nmodel: {base_folder}\ndata:\n  train: rows.jsonl\n  validation: 15\n  system: be kind\n"
        "lora:\n  rank: 4\ntrain:\n  epochs: 3\n  batch_size: 6\n  learning_rate: 0.005\n  precision: float32\n"
        "evaluate:\n  generate_rows: 3\n  samples: 2\n  max_new_tokens: 8\n"
    )
    return tmp_path


def test_a_run_raises_the_margin_and_says_what_it_did(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tunery.train("task.yaml", progress=QUIET)
    receipt, evaluation = run.receipt, run.evaluation
    assert receipt["data"]["kind"] == "feedback"
    assert receipt["training"]["objective"] == "kto"
    kto = receipt["kto"]
    assert kto["beta"] == 0.1
    assert kto["train"]["desirable"] + kto["train"]["undesirable"] == receipt["data"]["train_rows"] == 45
    assert kto["desirable_weight"] == 1.0
    assert kto["undesirable_weight"] == pytest.approx(kto["train"]["desirable"] / kto["train"]["undesirable"])
    assert receipt["reload"]["difference"] == 0
    assert evaluation is not None
    tuned, base = evaluation["tuned"], evaluation["base"]
    assert tuned["rewards_margin"] > 0.5
    assert tuned["rewards_accuracy"] > 0.95
    low, high = tuned["rewards_accuracy_interval"]
    assert low <= tuned["rewards_accuracy"] <= high
    assert base["rewards_margin"] == 0
    assert not {"rewards_accuracy", "rewards_accuracy_interval"} & set(base)
    assert tuned["rejected_loss"] > base["rejected_loss"]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] == 0
    assert any(line.get("kl", 0) > 0 for line in lines)
    assert any("valid_rewards_margin" in line for line in lines)
    page = (run.path / "report.html").read_text()
    assert "Of a good and a bad answer among 15 held-out rows, the training favours the good one" in page
    assert "Reward margin" in page
    assert "Loss of single answers while training (KTO)" in page
    show.run(run)
    printed = capsys.readouterr().out
    assert "15 held-out rows" in printed
    assert "reward margin" in printed
    assert tunery.load(run.path).answer("how is film 3?", max_new_tokens=4)
    assert Conversation(tunery.load(run.path)).remembers


def test_check_shows_both_sorts_of_answers(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tunery.check("task.yaml", samples=3)
    assert set(report["sample_sides"]) <= {"chosen", "rejected"}
    assert report["training"]["unit"] == "row"
    show.check(report)
    assert "Answers marked good: 31; marked bad: 14." in capsys.readouterr().out or any(
        "Answers marked good" in note for note in report["notes"]
    )


def test_an_interrupted_run_ends_with_the_same_adapter(project: Path) -> None:
    settings = ["train.max_steps=8", "evaluate.enabled=false"]
    whole = tunery.train("task.yaml", ["name=whole", *settings], progress=QUIET)
    with pytest.raises(StoppedError):
        tunery.train("task.yaml", settings, progress=Interrupting(3))
    resumed = tunery.train("task.yaml", settings, progress=QUIET)
    assert resumed.receipt["training"]["resumed_from"] == [3]
    for name, tensor in adapter(whole.path).items():
        assert (tensor == adapter(resumed.path)[name]).all(), name


def test_pairs_can_be_trained_as_single_answers(project: Path) -> None:
    rows = [
        {"prompt": f"how is {t} {n}?", "chosen": f"the {t} is good", "rejected": f"a dull {t}, the best of films"}
        for n, t in enumerate(THINGS * 5)
    ]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["train.objective=kto", "train.max_steps=4", "data.validation=6"]
    run = tunery.train("task.yaml", settings, progress=QUIET)
    assert run.receipt["data"]["kind"] == "preference"
    assert run.receipt["kto"]["train"] == {"desirable": 24, "undesirable": 24}
    assert run.receipt["training"]["unit"] == "row"
    assert run.evaluation is not None
    assert run.evaluation["rows"] == 12


def test_settings_of_another_objective_are_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.undesirable_weight has no meaning for kind chat: it belongs to kto"):
        tunery.check("task.yaml", ["train.undesirable_weight=2", "data.kind=chat"])
    with pytest.raises(ConfigError, match="these rows are not such pairs"):
        tunery.check("task.yaml", ["train.objective=dpo"])


def test_good_answers_alone_can_be_trained(project: Path) -> None:
    run = tunery.train("task.yaml", ["train.objective=sft", "train.max_steps=3", "name=good"], progress=QUIET)
    assert run.receipt["training"]["objective"] == "sft"
    assert run.receipt["data"]["train_rows"] == 31 or run.receipt["data"]["train_rows"] < 45


def test_rows_of_one_sort_can_be_judged_afterwards_with_the_runs_own_weights(project: Path) -> None:
    run = tunery.train("task.yaml", ["train.max_steps=3"], progress=QUIET)
    (project / "good.jsonl").write_text(
        '{"prompt": "how is film?", "completion": "the film is good", "label": true}\n' * 3
    )
    result = tunery.evaluate(run.path, project / "good.jsonl", progress=QUIET)
    assert result["undesirable_weight"] == run.receipt["kto"]["undesirable_weight"]
    assert "rewards_accuracy" not in result["tuned"]
    assert result["tuned"]["loss"] > 0
