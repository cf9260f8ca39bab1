"""The main job from a task file to a run directory, on a tiny model: what a person would see and rely on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tunery
from tests.support.films import Films, write_films
from tests.tiny import CHATML, save_tiny_llama, tiny_tokenizer
from tunery.api import examine
from tunery.console import Console
from tunery.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ResumableError,
    StoppedError,
)
from tunery.lora.attach import adapter_state
from tunery.progress import Note
from tunery.records.check_report import CheckReport
from tunery.records.typed_record import Record
from tunery.training.checkpoint import export_checkpoint


@pytest.fixture
def project(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task and 80 rows that a tiny model can learn."""
    monkeypatch.chdir(tmp_path)
    return write_films(tmp_path, base_folder)


QUIET = Console(quiet=True)


class Interrupting(Console):
    """Sends a signal after a step; keeps what was said."""

    def __init__(self, step: int | None = None, number: int = signal.SIGINT):
        super().__init__(quiet=True)
        self.step, self.number, self.said = step, number, []

    def note(self, note: Note) -> None:
        self.said.append(str(note))

    def log(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.step and "train_loss" in line:
            os.kill(os.getpid(), self.number)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_directory_is_complete_and_the_tuned_model_is_better(films: Films) -> None:
    run = films.path
    assert films.run.path == Path("runs/films")
    names = {p.name for p in run.iterdir()}
    assert {
        "task.yaml",
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "evaluation.json",
        "predictions.jsonl",
        "receipt.json",
        "report.html",
    } <= names
    in_adapter = {p.name for p in (run / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= in_adapter
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["tuned"]["loss"] < evaluation["base"]["loss"]
    assert evaluation["tuned"]["accuracy"] == 1.0
    assert evaluation["rows"] == 16
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "train_loss" in m] == list(range(1, 25))
    assert any("valid_loss" in m for m in metrics)


def test_predictions_of_all_held_out_rows_are_kept(films: Films) -> None:
    kept = [json.loads(line) for line in (films.path / "predictions.jsonl").read_text().splitlines()]
    assert len(kept) == 16
    assert all(row["where"].startswith("rows.csv:") for row in kept)
    assert sum(row["tuned"] == row["expected"] for row in kept) == 16
    right = sum(row["base"] == row["expected"] for row in kept)
    assert films.run.evaluation is not None
    assert films.run.evaluation.base.accuracy == right / 16
    assert all(0.5 <= row["tuned_probability"] <= 1 for row in kept)
    assert kept[0]["input"].startswith("film ")


def test_a_run_shows_itself(films: Films, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(films.project)
    run = films.run
    assert run.report == Path("runs/films/report.html")
    assert run.report.is_file()
    assert len(run.predictions) == 16
    assert all(one.tuned == one.expected for one in run.predictions)
    assert repr(run).startswith("<Run runs/films: The tuned model labels 100.0% of 16 held-out rows correctly")
    shown = run._repr_html_()
    assert "16 held-out rows" in shown
    assert "<td>Accuracy</td><td>37.5%</td><td>100.0%</td>" in shown
    assert run.evaluation is not None
    assert "<th>accuracy</th><td>0.375</td><td>1</td>" in run.evaluation._repr_html_()
    assert "<th>steps</th><td>24</td>" in run.receipt._repr_html_()
    assert repr(run.load()) == f"<TunedModel films: classification on {run.receipt['model']['name']}, float32>"


def test_a_run_whose_folder_has_gone_still_has_a_name(films: Films, tmp_path: Path) -> None:
    gone = dataclasses.replace(films.run, path=tmp_path / "<gone>")
    assert repr(gone) == f"<Run {tmp_path / '<gone>'}>"
    assert "&lt;gone&gt;" in gone._repr_html_()
    assert gone.predictions == []


def test_what_a_notebook_shows_is_escaped() -> None:
    report = Record.of({"name": "<script>", "rows": ["<b>", "<i>"], "more": {"<u>": 1.5}})
    shown = report._repr_html_()
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "<u>" not in shown
    assert "&lt;script&gt;" in shown
    assert "1.5" in shown


def test_keywords_are_settings(project: Path) -> None:
    run = tunery.train("task.yaml", train={"max_steps": 2}, lora={"rank": 2}, name="short", progress=QUIET)
    assert run.path == Path("runs/short")
    assert (run.receipt["training"]["steps"], run.receipt["lora"]["rank"]) == (2, 2)
    assert run.receipt["training"]["batch_size"] == 8
    with pytest.raises(ConfigError, match=r"lroa: unknown setting; did you mean lora"):
        tunery.train("task.yaml", lroa={"rank": 2}, progress=QUIET)


def test_a_task_that_is_given_takes_keywords_too(project: Path) -> None:
    task = tunery.load_task("task.yaml")
    report = tunery.check(task, ["train.max_steps=3"], seed=5)
    assert isinstance(report, CheckReport)
    assert report.training.steps == 3


def test_the_receipt_tells_what_was_trained(films: Films) -> None:
    receipt = films.run.receipt
    assert receipt["data"]["train_rows"] == 64
    assert receipt["data"]["validation_rows"] == 16
    assert receipt["tokens"]["end_of_turn_token"] == "<|im_end|>"
    assert receipt["tokens"]["end_of_turn_trained"] is True
    assert receipt["tokens"]["computed"] < receipt["tokens"]["data"]
    assert all(tensor["moved"] > 0 for tensor in receipt["lora"]["tensors"].values())
    assert len(receipt["lora"]["matched"]) == 14
    assert receipt["reload"]["ok"]
    assert receipt["reload"]["difference"] <= 1e-6
    assert receipt["training"]["steps"] == 24
    assert receipt["training"]["final_loss"] < receipt["training"]["first_loss"]
    assert 0 < receipt["speed"]["matmul_share"] < 1
    assert receipt["speed"]["startup_seconds"] > 0
    assert set(receipt["versions"]) >= {"python", "torch", "transformers", "tunery"}


def test_a_loaded_run_answers_classifies_and_steps_aside(films: Films, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(films.project)
    tuned = films.run.load()
    shares = tuned.classify(["film 3 is fine", "film 4 is dull"])
    assert shares[0]["good"] > 0.9
    assert shares[1]["bad"] > 0.9
    assert tuned.answer("film 5 is fine", max_new_tokens=8) == "good"
    assert "".join(tuned.stream("film 6 is dull", max_new_tokens=8)) == "bad"
    with tuned.untuned():
        base_share = tuned.classify(["film 3 is fine"])[0]["good"]
    assert abs(base_share - shares[0]["good"]) > 0.05


def test_interrupting_saves_and_resuming_gives_the_same_adapter_bit_for_bit(project: Path) -> None:
    undisturbed = tunery.train("task.yaml", ["name=whole", "lora.dropout=0.1"], progress=QUIET)
    with pytest.raises(StoppedError) as stopped:
        tunery.train("task.yaml", ["name=parts", "lora.dropout=0.1"], progress=Interrupting(5))
    assert stopped.value.exit_code == 130
    assert "run the same command again" in str(stopped.value)
    with pytest.raises(StoppedError) as stopped:
        tunery.train("task.yaml", ["name=parts", "lora.dropout=0.1"], progress=Interrupting(13, signal.SIGTERM))
    assert stopped.value.exit_code == 143
    resumed = tunery.train("task.yaml", ["name=parts", "lora.dropout=0.1"], progress=QUIET)
    assert same(adapter(undisturbed.path), adapter(resumed.path))
    assert resumed.receipt["training"]["resumed_from"] == [5, 13]
    losses = [
        [
            m["train_loss"]
            for m in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
            if "train_loss" in m
        ]
        for run in (undisturbed, resumed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked under Linux only")
def test_workers_train_the_same_adapter_and_resume_bit_for_bit(project: Path) -> None:
    alone = tunery.train("task.yaml", ["name=a", "train.cpu_workers=1"], progress=QUIET)
    workers = ["train.cpu_workers=2", "lora.dropout=0.0"]
    beside = tunery.train("task.yaml", ["name=b", *workers], progress=QUIET)
    assert beside.receipt["device"]["workers"] == 2
    assert alone.receipt["device"]["workers"] == 1
    assert beside.receipt["training"]["final_loss"] == pytest.approx(alone.receipt["training"]["final_loss"], rel=1e-3)
    with pytest.raises(StoppedError):
        tunery.train("task.yaml", ["name=c", *workers], progress=Interrupting(7))
    resumed = tunery.train("task.yaml", ["name=c"], progress=QUIET)  # auto keeps the number
    assert resumed.receipt["device"]["workers"] == 2
    assert same(adapter(resumed.path), adapter(beside.path))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked under Linux only")
def test_a_run_whose_worker_is_killed_goes_on_from_the_step_it_had_reached(project: Path) -> None:
    class Killing(Interrupting):
        def log(self, line: Mapping[str, Any]) -> None:
            if line["step"] == 5 and "train_loss" in line:
                (worker,) = psutil.Process().children()
                worker.kill()

    settings = ["train.cpu_workers=2", "train.save_steps=null", "train.eval_steps=null"]
    with pytest.raises(ResumableError, match="a worker process of this run has ended"):
        tunery.train("task.yaml", settings, progress=Killing())
    run = tunery.train("task.yaml", settings, progress=QUIET)
    assert run.receipt["training"]["resumed_from"] == [5]
    undisturbed = tunery.train("task.yaml", [*settings, "name=b"], progress=QUIET)
    assert same(adapter(run.path), adapter(undisturbed.path))


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(project: Path) -> None:
    first = tunery.train("task.yaml", ["name=a", "train.max_steps=4"], progress=QUIET)
    second = tunery.train("task.yaml", ["name=b", "train.max_steps=4"], progress=QUIET)
    other = tunery.train("task.yaml", ["name=c", "train.max_steps=4", "seed=1"], progress=QUIET)
    assert same(adapter(first.path), adapter(second.path))
    assert not same(adapter(first.path), adapter(other.path))


def test_checkpointing_activations_does_not_change_the_update(project: Path) -> None:
    plain = tunery.train("task.yaml", ["name=a", "train.max_steps=4", "lora.dropout=0.2"], progress=QUIET)
    recomputed = tunery.train(
        "task.yaml",
        ["name=b", "train.max_steps=4", "lora.dropout=0.2", "train.gradient_checkpointing=true"],
        progress=QUIET,
    )
    for name, tensor in adapter(plain.path).items():
        assert torch.allclose(tensor, adapter(recomputed.path)[name], rtol=1e-4, atol=1e-6), name


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(project: Path) -> None:
    run = tunery.train("task.yaml", progress=QUIET)
    before = (run.path / "receipt.json").read_text()
    progress = Interrupting()
    tunery.train("task.yaml", progress=progress)
    assert (run.path / "receipt.json").read_text() == before
    assert "already finished" in progress.said[-1]
    with pytest.raises(ConfigError, match=r"lora\.rank: 4 → 8"):
        tunery.train("task.yaml", ["lora.rank=8"], progress=QUIET)
    tunery.train("task.yaml", ["lora.rank=8"], resume="never", progress=QUIET)
    assert (Path("runs/films.old-1") / "receipt.json").read_text() == before


def test_resuming_with_other_settings_or_rows_is_refused(project: Path) -> None:
    with pytest.raises(StoppedError):
        tunery.train("task.yaml", progress=Interrupting(3))
    written = Path("runs/films/task.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"train\.batch_size: 8 → 4"):
        tunery.train("task.yaml", ["train.batch_size=4"], progress=QUIET)
    assert Path("runs/films/task.yaml").read_text() == written
    rows = (project / "rows.csv").read_text()
    (project / "rows.csv").write_text(rows.replace("dull", "grey"))
    with pytest.raises(CheckpointError, match=r"changed since .*the training rows"):
        tunery.train("task.yaml", progress=QUIET)


def test_a_checkpoint_that_cannot_be_read_is_said_and_an_earlier_one_can_be_named(project: Path) -> None:
    with pytest.raises(StoppedError):
        tunery.train("task.yaml", ["train.save_steps=2", "train.save_limit=3"], progress=Interrupting(5))
    checkpoints = Path("runs/films/checkpoints")
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-2", "step-4", "step-5"]
    (checkpoints / "step-5" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="step-5 cannot be read"):
        tunery.train("task.yaml", progress=QUIET)
    run = tunery.train("task.yaml", resume=str(checkpoints / "step-4"), progress=QUIET)
    assert run.receipt["training"]["resumed_from"] == [4]


def test_a_checkpoint_is_an_adapter_folder(project: Path, base_folder: Path) -> None:
    run = tunery.train(
        "task.yaml", ["train.max_steps=4", "train.save_steps=2", "evaluate.enabled=false"], progress=QUIET
    )
    exported = export_checkpoint(run.path, 2, project / "exported")
    final = run.path / "checkpoints" / "step-4"
    assert same(load_file(final / "adapter_model.safetensors"), adapter(run.path))
    for folder in (exported, final):
        assert json.loads((folder / "adapter_config.json").read_text()) == json.loads(
            (run.path / "adapter" / "adapter_config.json").read_text()
        )
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        tunery.load_adapter(model, folder)
        stored = load_file(folder / "adapter_model.safetensors")
        assert same({name: tensor.detach() for name, tensor in adapter_state(model).items()}, stored)
    assert not same(load_file(exported / "adapter_model.safetensors"), adapter(run.path))


def test_early_stopping_goes_back_to_the_best_step(project: Path) -> None:
    contrary = "".join(
        f"film {i} is {'fine' if i % 2 else 'dull'},{'bad' if i % 2 else 'good'}\n" for i in range(90, 98)
    )
    (project / "contrary.csv").write_text(f"text,label\n{contrary}")
    run = tunery.train(
        "task.yaml",
        [
            "data.validation=contrary.csv",
            "train.epochs=20",
            "train.eval_steps=4",
            "train.early_stopping_patience=2",
            "train.scheduler=constant",
        ],
        progress=QUIET,
    )
    training = run.receipt["training"]
    assert training["stopped"] == "early stopping"
    assert training["steps"] < training["planned_steps"]
    assert training["steps"] - training["best_step"] == 8
    assert training["restored_step"] == training["best_step"]
    best = load_file(run.path / "checkpoints" / f"step-{training['best_step']}" / "adapter_model.safetensors")
    assert same(best, adapter(run.path))


def test_a_loss_that_is_not_finite_stops_before_the_update(project: Path, base_folder: Path) -> None:
    broken = project / "broken"
    shutil.copytree(base_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DivergedError, match=r"(?s)step 1: the loss is nan.*rows\.csv:") as diverged:
        tunery.train("task.yaml", [f"model={broken}"], progress=QUIET)
    assert diverged.value.exit_code == 5
    assert not Path("runs/films/adapter").exists()


def test_a_full_disk_is_said_and_the_run_can_go_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ResumableError, match="disk is full") as error:
            tunery.train("task.yaml", ["train.save_steps=2"], progress=QUIET)
    assert error.value.exit_code == 75
    assert list(Path("runs/films/checkpoints").glob("*")) == []
    assert tunery.train("task.yaml", ["train.save_steps=2"], progress=QUIET).receipt["training"]["steps"] == 24


def test_a_changed_adapter_template_or_base_is_refused_at_load(project: Path, base_folder: Path) -> None:
    own = project / "own"
    shutil.copytree(base_folder, own)
    run = tunery.train("task.yaml", [f"model={own}", "train.max_steps=2"], progress=QUIET)
    saved = adapter(run.path)
    save_file(dict(list(saved.items())[1:]), run.path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError):
        tunery.load(run.path)
    save_file(saved, run.path / "adapter" / "adapter_model.safetensors")
    tunery.load(run.path)
    tiny_tokenizer(CHATML.replace("user", "human")).save_pretrained(own)
    tiny_tokenizer(CHATML + " ").save_pretrained(own)
    with pytest.raises(AdapterError, match="chat template"):
        tunery.load(run.path)
    tiny_tokenizer().save_pretrained(own)
    save_tiny_llama(own, seed=5)
    with pytest.raises(AdapterError, match="another hash"):
        tunery.load(run.path)


def test_an_adapter_that_was_not_saved_as_trained_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunery.training import fit

    real = fit.write_adapter_files

    def corrupting(model: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        real(model, folder, *args, **kwargs)
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(n for n in tensors if "lora_B" in n)
        save_file({**tensors, name: torch.zeros_like(tensors[name])}, folder / "adapter_model.safetensors")

    monkeypatch.setattr(fit, "write_adapter_files", corrupting)
    with pytest.raises(AdapterError, match="saved adapter gives a loss"):
        tunery.train("task.yaml", progress=QUIET)


def test_evaluating_on_further_rows_and_again(project: Path) -> None:
    run = tunery.train("task.yaml", ["evaluate.enabled=false"], progress=QUIET)
    assert run.evaluation is None
    (project / "more.jsonl").write_text(
        '{"text": "film 90 is dull", "label": "bad"}\n{"text": "film 91 is fine", "label": "good"}\n'
    )
    more = tunery.evaluate(run.path, "more.jsonl", progress=QUIET)
    assert (more["rows"], more["tuned"]["accuracy"]) == (2, 1.0)
    assert (run.path / "evaluation-more.json").exists()
    assert tunery.evaluate(run.path, progress=QUIET)["rows"] == 16
    assert (run.path / "evaluation.json").exists()
    (project / "odd.jsonl").write_text('{"text": "a", "label": "so-so"}\n')
    with pytest.raises(DataError, match=r"odd\.jsonl:1:label"):
        tunery.evaluate(run.path, "odd.jsonl", progress=QUIET)


@pytest.mark.parametrize("kind", ["chat", "completion", "text"])
def test_every_kind_trains_evaluates_and_answers(project: Path, kind: str) -> None:
    words = ["fine", "dull", "best"]
    rows = {
        "chat": lambda i: {
            "messages": [{"role": "user", "content": f"film {i}?"}, {"role": "assistant", "content": words[i % 3]}]
        },
        "completion": lambda i: {"prompt": f"film {i} is ", "completion": words[i % 3]},
        "text": lambda i: {"text": f"the film number {i} is a {words[i % 3]} film, and so on and on"},
    }[kind]
    (project / "rows.jsonl").write_text("".join(json.dumps(rows(i)) + "\n" for i in range(40)))
    run = tunery.train(
        "task.yaml",
        ["data.train=rows.jsonl", "data.instruction=null", "evaluate.max_new_tokens=8", "evaluate.generate_rows=4"],
        progress=QUIET,
    )
    assert run.receipt["data"]["kind"] == kind
    assert run.receipt["tokens"]["end_of_turn_trained"]
    assert run.evaluation is not None
    assert run.evaluation["tuned"]["loss"] < run.evaluation["base"]["loss"]
    assert "chrf" in run.evaluation["tuned"]
    assert len(run.evaluation["samples"]) == 4
    assert isinstance(run.load().answer("film 3 is ", max_new_tokens=4), str)


def test_check_tells_what_will_be_trained_without_training(project: Path) -> None:
    result = tunery.check("task.yaml")
    assert isinstance(result, CheckReport)
    assert CheckReport.of(json.loads(json.dumps(result.as_json()))) == result
    assert result.training.steps == result["training"]["steps"]
    assert result["data"]["train_rows"] == 64
    trained_rows = [sum(on for _, on in pieces) for pieces in result["samples"]]
    assert trained_rows == [1, 1, 1]
    assert 64 * 2 <= result["tokens"]["trained"] <= 64 * 5  # a label of a few tokens and its end token
    assert result["training"]["steps"] == 24
    assert result["training"]["layers"] == 14
    assert result["training"]["memory_bytes"] > 0
    trained = "".join(text for text, on in result["samples"][0] if on)
    assert trained in ("good<|im_end|>", "bad<|im_end|>")
    assert not Path("runs").exists()


def test_the_multiplier_is_in_every_rate_that_is_shown(project: Path) -> None:
    twice = ["train.learning_rate_multiplier=2", "train.max_steps=3", "train.warmup=0", "evaluate.enabled=false"]
    assert tunery.check("task.yaml", twice)["training"]["learning_rate"] == 0.04
    run = tunery.train("task.yaml", twice, progress=QUIET)
    assert run.receipt["training"]["learning_rate"] == 0.04
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert next(line["learning_rate"] for line in lines if "train_loss" in line) == pytest.approx(0.04)
    plain = tunery.train(
        "task.yaml", ["name=b", *twice, "train.learning_rate_multiplier=1", "train.learning_rate=0.04"], progress=QUIET
    )
    assert same(adapter(run.path), adapter(plain.path))


def test_metrics_hold_loss_and_token_accuracy_of_both_sides(project: Path) -> None:
    run = tunery.train("task.yaml", ["train.eval_steps=6", "evaluate.enabled=false"], progress=QUIET)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    checks = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in checks] == [6, 12, 18, 24]
    assert all(0 <= line["train_token_accuracy"] <= 1 for line in steps)
    assert all(0 <= line["valid_token_accuracy"] <= 1 for line in checks)
    assert steps[-1]["train_token_accuracy"] > steps[0]["train_token_accuracy"]
    assert checks[-1]["valid_token_accuracy"] > 0.9


def test_examining_gives_as_values_what_training_would_stop_at(project: Path) -> None:
    rows = (project / "rows.csv").read_text()
    (project / "rows.csv").write_text(rows + ",good\nfilm 90 is fine,\nfilm 91 is fine,good\n")
    (project / "more.csv").write_text("text,label\nfilm 92 is dull,bad\nfilm 93 is odd,odd\n")
    more = ["data.validation=more.csv"]
    found = examine("task.yaml", more)
    assert set(found) == {"train", "validation"}
    assert [(p.file, p.line, p.field) for p in found["train"].problems] == [
        ("rows.csv", 82, "text"),
        ("rows.csv", 83, "label"),
    ]
    assert [(p.file, p.line, p.field) for p in found["validation"].problems] == [("more.csv", 3, "label")]
    assert (found["train"].rows, len(found["train"].examples)) == (83, 81)
    with pytest.raises(DataError) as stopped:
        tunery.check("task.yaml", more)
    for problem in (*found["train"].problems, *found["validation"].problems):
        assert str(problem) in stopped.value.message
    result = tunery.check("task.yaml", [*more, "data.on_bad_row=skip"], samples=2)
    assert result["data"]["train_rows"] == 81
    assert result["sample_names"] == [f"rows.csv:{line}" for line in result["sample_lines"]]


def test_a_second_process_is_kept_out_of_a_run_in_use(project: Path) -> None:
    from tunery.paths import lock

    with lock(Path("runs/.films.lock")), pytest.raises(ConfigError, match="another process"):
        tunery.train("task.yaml", progress=QUIET)


def grow(project: Path) -> None:
    with open(project / "rows.csv", "a") as file:
        file.writelines(f"film {i} is fine,good\n" for i in range(200, 230))


def test_a_run_is_not_judged_by_rows_it_may_have_been_trained_on(project: Path) -> None:
    run = tunery.train("task.yaml", ["train.max_steps=2"], progress=QUIET)
    before = (run.path / "evaluation.json").read_text()
    progress = Interrupting()
    tunery.evaluate(run.path, "rows.csv", progress=progress)
    assert any("64 of these 80 rows have a text that was trained" in words for words in progress.said)
    grow(project)
    for again in (
        lambda: tunery.evaluate(run.path, progress=QUIET),
        lambda: tunery.train("task.yaml", ["train.max_steps=2"]),
    ):
        with pytest.raises(DataError, match="train and validation rows have changed"):
            again()
    assert (run.path / "evaluation.json").read_text() == before


def test_asking_a_finished_run_for_another_evaluation_gives_it(project: Path) -> None:
    tunery.train("task.yaml", ["train.max_steps=2"], progress=QUIET)
    run = tunery.train("task.yaml", ["train.max_steps=2", "evaluate.max_rows=3"], progress=QUIET)
    assert run.evaluation is not None
    assert run.evaluation["rows"] == 3


def test_going_on_with_another_base_or_other_validation_rows_is_refused(project: Path, base_folder: Path) -> None:
    own = project / "own"
    shutil.copytree(base_folder, own)
    (project / "held.csv").write_text("text,label\nfilm 300 is fine,good\nfilm 301 is dull,bad\n")
    settings = [f"model={own}", "data.validation=held.csv"]
    with pytest.raises(StoppedError):
        tunery.train("task.yaml", settings, progress=Interrupting(3))
    (project / "held.csv").write_text("text,label\nfilm 300 is fine,bad\nfilm 301 is dull,bad\n")
    save_tiny_llama(own, seed=5)
    with pytest.raises(CheckpointError, match="the validation rows, the base model"):
        tunery.train("task.yaml", settings, progress=QUIET)


def test_killed_between_the_last_step_and_the_receipt_the_run_ends_as_it_would_have(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunery.training import fit

    contrary = "".join(
        f"film {i} is {'fine' if i % 2 else 'dull'},{'bad' if i % 2 else 'good'}\n" for i in range(90, 98)
    )
    (project / "contrary.csv").write_text(f"text,label\n{contrary}")
    settings = [
        "data.validation=contrary.csv",
        "train.epochs=20",
        "train.eval_steps=4",
        "train.early_stopping_patience=1",
    ]
    whole = tunery.train("task.yaml", [*settings, "name=whole"], progress=QUIET)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit, "_save_adapter", killed)
        with pytest.raises(StoppedError, match="the checkpoint of step 20 is kept"):
            tunery.train("task.yaml", [*settings, "name=parts"], progress=QUIET)
    resumed = tunery.train("task.yaml", [*settings, "name=parts"], progress=QUIET)
    assert resumed.receipt["training"]["stopped"] == "early stopping"
    assert same(adapter(whole.path), adapter(resumed.path))


def test_a_stop_in_the_last_step_leaves_a_trained_run_that_is_evaluated_next_time(project: Path) -> None:
    with pytest.raises(StoppedError, match="trained and saved") as stopped:
        tunery.train("task.yaml", ["train.max_steps=3"], progress=Interrupting(3, signal.SIGTERM))
    assert stopped.value.exit_code == 143
    assert not Path("runs/films/evaluation.json").exists()
    assert tunery.train("task.yaml", ["train.max_steps=3"], progress=QUIET).evaluation is not None


def test_an_update_that_ruins_the_model_is_divergence_and_is_not_saved(project: Path) -> None:
    settings = ["train.learning_rate=1e30", "train.warmup=0", "train.eval_steps=1"]
    with pytest.raises(DivergedError, match="validation loss"):
        tunery.train("task.yaml", settings, progress=QUIET)
    assert list(Path("runs/films/checkpoints").glob("*")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_that_runs_out_in_evaluation_halves_the_batch(
    workers: int, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunery.training import scoring

    run = tunery.train("task.yaml", ["train.max_steps=2", f"train.cpu_workers={workers}"], progress=QUIET)
    real, tried = scoring.batch_loss, []

    def tight(model: Any, batch: Any) -> Any:
        tried.append(len(batch.ids))
        if len(batch.ids) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, batch)

    monkeypatch.setattr(scoring, "batch_loss", tight)
    again = tunery.evaluate(run.path, progress=QUIET)
    assert max(tried) > 60
    assert run.evaluation is not None
    assert again["tuned"]["loss"] == pytest.approx(run.evaluation["tuned"]["loss"], rel=1e-5)


def test_prompts_near_the_models_context_are_answered_as_far_as_it_reaches(project: Path) -> None:
    messages = [{"role": "user", "content": "film " * 300}, {"role": "assistant", "content": "fine"}]
    (project / "rows.jsonl").write_text("".join(json.dumps({"messages": messages, "n": i}) + "\n" for i in range(6)))
    run = tunery.train(
        "task.yaml",
        ["data.train=rows.jsonl", "data.validation=null", "data.instruction=null", "train.max_steps=1"],
        progress=QUIET,
    )
    tuned = run.load()
    assert isinstance(tuned.answer("film " * 30, max_new_tokens=10_000), str)
    with pytest.raises(ConfigError, match="tokens"):
        tuned.answer("film " * 3000)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        tuned.answer("film", max_new_token=3)
    with pytest.raises(ConfigError, match="nothing to answer"):
        tuned.answer([])


def test_a_task_made_in_python_with_relative_paths_can_be_evaluated_later(project: Path, base_folder: Path) -> None:
    task = tunery.Task.model_validate(
        {"name": "py", "model": str(base_folder), "data": {"train": "rows.csv"}, "train": {"max_steps": 2}}
    )
    run = tunery.train(task, progress=QUIET)
    assert tunery.evaluate(run.path, progress=QUIET)["rows"] == 8


def test_the_models_own_sampling_settings_are_not_used(project: Path, base_folder: Path) -> None:
    own = project / "own"
    shutil.copytree(base_folder, own)
    settings = {"do_sample": True, "temperature": 3.0, "suppress_tokens": list(range(3, 300)), "max_new_tokens": 1}
    (own / "generation_config.json").write_text(json.dumps(settings))
    plain = tunery.train("task.yaml", ["name=a", "train.max_steps=2"], progress=QUIET).load()
    other = tunery.train("task.yaml", ["name=b", "train.max_steps=2", f"model={own}"], progress=QUIET).load()
    asked = [{"role": "user", "content": "film"}]
    assert plain.answer(asked, max_new_tokens=12) == other.answer(asked, max_new_tokens=12)


def out_of_memory_unless_recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that holds one row at a time, if its activations are recomputed."""
    from tunery.training.decoder_layers import DecoderLayers
    from tunery.training.objectives import sft

    real = sft.batch_loss

    def failing(model: Any, batch: Any) -> Any:
        if all("forward" not in layer.__dict__ for layer in DecoderLayers(model.model).layers):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch)

    monkeypatch.setattr(sft, "batch_loss", failing)


def test_when_memory_runs_out_with_one_row_a_run_recomputes_says_so_and_resumes_that_way(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunery.train(
        "task.yaml", overrides=["name=free", "train.micro_batch_size=1", "evaluate.enabled=false"], progress=QUIET
    )
    out_of_memory_unless_recomputing(monkeypatch)
    settings = ["name=tight", "evaluate.enabled=false"]
    first = Interrupting(3)
    with pytest.raises(StoppedError):
        tunery.train("task.yaml", overrides=settings, progress=first)
    (said,) = [note for note in first.said if "memory ran out" in note]
    assert said == "memory ran out: the step was computed again, 1 row at a time, recomputing activations (slower)"
    second = Interrupting()
    run = tunery.train("task.yaml", overrides=settings, progress=second)
    assert not any("memory ran out" in note for note in second.said)  # it knew
    assert run.receipt["training"]["recomputed_activations"] is True
    assert run.receipt["training"]["out_of_memory_retries"] == 4  # 8, 4, 2 rows, then recomputing
    tight, free = adapter(Path("runs/tight")), adapter(Path("runs/free"))
    assert all(torch.allclose(tight[name], free[name], rtol=1e-4, atol=1e-5) for name in free)


def test_without_leave_to_recompute_a_run_stops_and_says_what_to_set(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunery.errors import ModelError

    out_of_memory_unless_recomputing(monkeypatch)
    with pytest.raises(ModelError, match="single row") as error:
        tunery.train("task.yaml", overrides=["train.gradient_checkpointing=false"], progress=QUIET)
    assert "gradient_checkpointing=true" in str(error.value.hint)


@pytest.mark.slow
def test_a_compiled_run_ends_where_a_plain_one_does_and_the_receipt_says_so(project: Path) -> None:
    short = ["train.max_steps=4", "evaluate.enabled=false"]
    plain = tunery.train("task.yaml", overrides=[*short, "name=plain"], progress=QUIET)
    progress = Interrupting()
    compiled = tunery.train("task.yaml", overrides=[*short, "name=compiled", "train.compile=true"], progress=progress)
    assert plain.receipt["training"]["compiled"] is False
    assert compiled.receipt["training"]["compiled"] is True
    assert any("are compiled" in note for note in progress.said)
    one, other = adapter(Path("runs/plain")), adapter(Path("runs/compiled"))
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5) for name in one)
