"""Going on from an adapter (`lora.start`): what a person would see and rely on, on a tiny model."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tunery
from tests.tiny import save_tiny_llama
from tunery.api import learning_rate_test
from tunery.config import LoraConfig, Task
from tunery.console import Console
from tunery.errors import AdapterError, CheckpointError, ConfigError, StoppedError
from tunery.fast.fused_mlp import FusedMLP
from tunery.fast.packed_model import optimize_model
from tunery.lora.attach import active_adapter, adapter_names, adapter_state
from tunery.progress import Note
from tunery.training import sizing, throughput
from tunery.training.objectives.base import REFERENCE
from tunery.training.start import attach_adapter

QUIET = Console(quiet=True)
THINGS = ("film", "answer", "day", "system", "user", "best")
COMMON = (
    "  validation: 8\ntrain:\n  batch_size: 6\n  learning_rate: 0.01\n  epochs: 2\n  precision: float32\n"
    "evaluate:\n  enabled: false\n"
)


class Watching(Console):
    """Keeps what is said, and sends a signal after a step."""

    def __init__(self, stop_after: int | None = None):
        super().__init__(quiet=True)
        self.stop_after, self.said = stop_after, []

    def note(self, note: Note) -> None:
        self.said.append(str(note))

    def log(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.stop_after and "train_loss" in line:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> tunery.Run:
    """A run on good answers, with an adapter that is not the default one in any respect."""
    folder = tmp_path_factory.mktemp("first")
    task = write_chat(folder, base_folder, "lora:\n  rank: 4\n  alpha: 12\n  targets: attention\n  dropout: 0.1\n")
    return tunery.train(task, [f"output={folder / 'runs'}"], progress=QUIET)


def write_chat(folder: Path, base: Path, lora: str) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"how is {(thing := THINGS[n % len(THINGS)])} {n}?"},
                {"role": "assistant", "content": f"the {thing} is good"},
            ]
        }
        for n in range(44)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(f"name: more\nmodel: {base}\n{lora}data:\n  train: rows.jsonl\n{COMMON}")
    return folder / "task.yaml"


def write_pairs(folder: Path, base: Path, lora: str) -> Path:
    rows = [
        {
            "prompt": f"how is {(thing := THINGS[n % len(THINGS)])} {n}?",
            "chosen": f"the {thing} is fine",
            "rejected": f"a dull {thing}, the best of films",
        }
        for n in range(44)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.yaml").write_text(f"name: taste\nmodel: {base}\n{lora}data:\n  train: pairs.jsonl\n{COMMON}")
    return folder / "pairs.yaml"


@pytest.fixture
def project(tmp_path: Path, base_folder: Path, first: tunery.Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the first adapter, and tasks that go on from it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(first.path / "adapter", tmp_path / "start")
    write_chat(tmp_path, base_folder, "lora:\n  start: start\n")
    write_pairs(tmp_path, base_folder, "lora:\n  start: start\n")
    return tmp_path


def adapter(run: tunery.Run | Path) -> dict[str, torch.Tensor]:
    folder = run.path / "adapter" if isinstance(run, tunery.Run) else run
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines_of(run: tunery.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------- supervised


def test_training_begins_with_the_adapter_as_it_was(project: Path, first: tunery.Run) -> None:
    run = tunery.train("task.yaml", ["train.max_steps=1", "train.learning_rate=1e-9"], progress=QUIET)
    assert run.receipt["training"]["valid_loss"] == pytest.approx(first.receipt["training"]["valid_loss"], rel=1e-5)
    before, after = adapter(first), adapter(run)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)
    configs = [config_of(r.path / "adapter") for r in (first, run)]
    assert configs[1] == {**configs[0], "lora_dropout": 0.0}  # dropout is a setting of each training


def test_every_tensor_moves_from_its_start_and_the_receipt_names_it(project: Path, first: tunery.Run) -> None:
    watching = Watching()
    run = tunery.train("task.yaml", progress=watching)
    lora, start = run.receipt["lora"], run.receipt["lora"]["start"]
    assert start["sha256"] == first.receipt["adapter"]["sha256"]
    assert (start["path"], start["base"], start["remark"]) == (
        str(project / "start"),
        first.receipt["model"]["name"],
        None,
    )
    assert (lora["rank"], lora["alpha"], lora["scaling"], lora["dropout"]) == (4, 12, 3, 0)
    assert lora["targets"] is None
    assert lora["matched"] == first.receipt["lora"]["matched"]
    assert all(tensor["moved"] > 0 for tensor in lora["tensors"].values())
    moved = {
        name: float((tensor - adapter(first)[name]).norm() / adapter(first)[name].norm())
        for name, tensor in adapter(run).items()
    }
    assert {name: tensor["moved"] for name, tensor in lora["tensors"].items()} == pytest.approx(moved, rel=1e-4)
    assert run.receipt["training"]["valid_loss"] < first.receipt["training"]["valid_loss"]
    assert f"starting from the adapter {project / 'start'}" in watching.said
    assert "Goes on from" in (run.path / "report.html").read_text()
    card = (run.path / "adapter" / "README.md").read_text()
    assert start["sha256"] in card
    assert str(project) not in card


def test_a_finished_run_can_be_loaded_and_measured_without_its_start(project: Path) -> None:
    run = tunery.train("task.yaml", progress=QUIET)
    shutil.rmtree("start")
    assert run.load().answer("how is film 3?", max_new_tokens=4)
    assert tunery.evaluate(run.path, progress=QUIET)["tuned"]["loss"] > 0


def test_interrupted_and_resumed_it_is_the_same_bit_for_bit(project: Path) -> None:
    settings = ["lora.dropout=0.2", "train.save_steps=3"]
    whole = tunery.train("task.yaml", ["name=whole", *settings], progress=QUIET)
    for step in (2, 7):
        with pytest.raises(StoppedError):
            tunery.train("task.yaml", ["name=parts", *settings], progress=Watching(step))
    shutil.move("start", "moved")  # the content counts, not the place
    resumed = tunery.train("task.yaml", ["name=parts", "lora.start=moved", *settings], progress=QUIET)
    assert resumed.receipt["training"]["resumed_from"] == [2, 7]
    assert same(adapter(whole), adapter(resumed))
    assert resumed.receipt["lora"]["tensors"] == whole.receipt["lora"]["tensors"]


def change(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def test_another_start_is_another_run(project: Path) -> None:
    with pytest.raises(StoppedError):
        tunery.train("task.yaml", progress=Watching(2))
    change(project / "start")
    with pytest.raises(CheckpointError, match=r"changed since .*the adapter to start from"):
        tunery.train("task.yaml", progress=QUIET)
    (project / "task.yaml").write_text((project / "task.yaml").read_text().replace("lora:\n  start: start\n", ""))
    with pytest.raises(CheckpointError, match=r"lora\.rank: None → 16.*lora\.start: 'given' → None"):
        tunery.train("task.yaml", progress=QUIET)


def test_a_finished_run_is_not_taken_for_one_from_another_start(project: Path) -> None:
    done = tunery.train("task.yaml", progress=QUIET)
    again = tunery.train("task.yaml", progress=QUIET)
    assert again.receipt == done.receipt
    scaled = config_of(project / "start") | {"lora_alpha": 6}
    (project / "start" / "adapter_config.json").write_text(json.dumps(scaled))
    with pytest.raises(ConfigError, match="started from another adapter"):
        tunery.train("task.yaml", progress=QUIET)


def test_the_best_step_is_gone_back_to(project: Path) -> None:
    options = ["train.learning_rate=0.5", "train.eval_steps=1", "train.early_stopping_patience=2", "train.epochs=9"]
    run = tunery.train("task.yaml", options, progress=QUIET)
    step = run.receipt["training"]["restored_step"]
    assert step == run.receipt["training"]["best_step"]
    assert same(adapter(run), adapter(run.path / "checkpoints" / f"step-{step}"))


def test_it_goes_on_from_a_checkpoint_too(project: Path, first: tunery.Run) -> None:
    (newest, *_) = sorted((first.path / "checkpoints").iterdir(), key=lambda p: -int(p.name.split("-")[1]))
    run = tunery.train("task.yaml", [f"lora.start={newest}", "train.max_steps=1"], progress=QUIET)
    assert run.receipt["lora"]["start"]["sha256"] == first.receipt["adapter"]["sha256"]


def test_check_and_the_rate_test_begin_with_it(project: Path, first: tunery.Run) -> None:
    training = tunery.check("task.yaml")["training"]
    lora = first.receipt["lora"]
    assert (training["layers"], training["trainable_parameters"]) == (
        len(lora["matched"]),
        lora["trainable_parameters"],
    )
    curve = learning_rate_test("task.yaml", steps=8, progress=QUIET)
    fresh = learning_rate_test("task.yaml", ["lora.start=null"], steps=8, progress=QUIET)
    assert curve.losses[0] < fresh.losses[0] - 0.1


@pytest.mark.parametrize("task", ["task.yaml", "pairs.yaml"])
def test_check_counts_the_operations_that_a_run_then_takes(
    project: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "matmul_rate", lambda *_: 1e15)
    steps = [f"train.max_steps={sizing.SAMPLED_STEPS}", "train.cpu_workers=1"]  # several compute shared tokens twice
    expected = tunery.check(task, steps)["training"]["flops"] / 1e15
    facts = tunery.train(task, steps, progress=QUIET).receipt
    seconds = facts["tokens"]["data"] / facts["speed"]["data_tokens_per_second"]
    assert facts["speed"]["matmul_share"] * seconds == pytest.approx(expected, rel=1e-9)


# --------------------------------------------------------------------------- preference


def test_preferences_are_measured_against_the_starting_adapter(project: Path) -> None:
    run = tunery.train("pairs.yaml", ["train.epochs=4"], progress=QUIET)
    steps = [line for line in lines_of(run) if "train_loss" in line]
    checks = [line for line in lines_of(run) if "valid_loss" in line]
    assert steps[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["rewards_chosen"] == steps[0]["rewards_rejected"] == 0
    assert checks[-1]["valid_rewards_margin"] > max(0.1, checks[0]["valid_rewards_margin"])
    assert all(tensor["moved"] > 0 for tensor in run.receipt["lora"]["tensors"].values())
    assert set(adapter(run)) == set(adapter(project / "start"))  # the copy is not saved
    assert run.receipt["reload"]["ok"]
    # against the base the same model is judged otherwise
    tuned = run.load()
    assert adapter_names(tuned.model) == ["default"]
    result = tunery.evaluate(run.path, progress=QUIET)
    assert result["base"]["rewards_margin"] == 0
    assert result["tuned"]["rewards_margin"] != pytest.approx(checks[-1]["valid_rewards_margin"], rel=1e-2)


def test_preferences_interrupted_and_resumed_are_the_same_bit_for_bit(project: Path) -> None:
    settings = ["lora.dropout=0.2", "train.micro_batch_size=2"]
    whole = tunery.train("pairs.yaml", ["name=whole", *settings], progress=QUIET)
    with pytest.raises(StoppedError):
        tunery.train("pairs.yaml", ["name=parts", *settings], progress=Watching(4))
    resumed = tunery.train("pairs.yaml", ["name=parts", *settings], progress=QUIET)
    assert same(adapter(whole), adapter(resumed))
    rewards = [
        [line["rewards_margin"] for line in lines_of(run) if "rewards_margin" in line] for run in (whole, resumed)
    ]
    assert rewards[0] == rewards[1]


def test_the_frozen_copy_is_put_on_for_preferences_only_and_not_trained(base_folder: Path, project: Path) -> None:
    task = tunery.load_task("task.yaml")
    for kind, names in (("chat", ["default"]), ("preference", [REFERENCE, "default"])):
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        attach_adapter(task, model, reference=kind == "preference")
        assert adapter_names(model) == names
        assert active_adapter(model) == "default"
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(p) for p in adapter_state(model).values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_savings_work_with_an_adapter_that_is_not_zero(
    base_folder: Path, project: Path, dtype: torch.dtype
) -> None:
    tunery.train("task.yaml", ["name=all", "lora.start=null", "lora.rank=4", "train.max_steps=3"], progress=QUIET)
    task = tunery.load_task("task.yaml", ["lora.start=runs/all/adapter"])
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
    attach_adapter(task, model)
    flat = optimize_model(model)
    assert flat.flattened
    assert flat.last_layer is not None
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2


# --------------------------------------------------------------------------- settings and folders


@pytest.mark.parametrize(
    "setting", ["rank: 8", "alpha: 3", "targets: mlp", "exclude: [q_proj]", "rank_stabilized: true"]
)
def test_what_the_adapter_brings_cannot_be_set_beside_it(project: Path, setting: str) -> None:
    name = setting.split(":")[0]
    text = (project / "task.yaml").read_text().replace("  start: start\n", f"  start: start\n  {setting}\n")
    (project / "task.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"task\.yaml:3:lora: lora\.{name} cannot be set together with lora\.start"):
        tunery.check("task.yaml")


def test_a_task_with_a_start_survives_being_written_and_read(project: Path) -> None:
    task = tunery.load_task("task.yaml", ["lora.dropout=0.1"])
    assert Task.model_validate(task.model_dump(mode="json")) == task
    (project / "copy.yaml").write_text(task.to_yaml())
    assert tunery.load_task("copy.yaml") == task
    assert "rank" not in task.to_yaml().split("lora:")[1].split("train:")[0]
    assert LoraConfig(rank=4).model_dump()["targets"] == "all-linear"


def test_a_folder_that_does_not_fit_is_named_with_the_setting(
    project: Path, first: tunery.Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def refused(start: Path, *more: str) -> AdapterError:
        with pytest.raises(AdapterError, match=r"^lora\.start: ") as error:
            tunery.check("task.yaml", [f"lora.start={start}", *more])
        with pytest.raises(AdapterError, match=r"^lora\.start: "):
            tunery.train("task.yaml", ["name=x", f"lora.start={start}", *more], progress=QUIET)
        return error.value

    assert "no adapter at" in refused(project / "nowhere").message
    assert refused(first.path).hint == f"did you mean {first.path / 'adapter'}?"
    wider = save_tiny_llama(tmp_path_factory.mktemp("wider"), width=48)
    assert "does not fit this model" in refused(project / "start", f"model={wider}").message
    (project / "start" / "adapter_model.safetensors").write_bytes(b"torn")
    assert "cannot be read" in refused(project / "start").message
    (project / "start" / "adapter_model.safetensors").unlink()
    assert "is missing" in refused(project / "start").message


def test_tensors_with_other_names_are_remarked_wherever_it_counts(project: Path) -> None:
    tensors = adapter(project / "start")
    file = project / "start" / "adapter_model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, file)
    said = f"lora.start: {len(tensors)} tensors of the adapter have other names than PEFT gives them; _orig_mod."
    assert any(remark.startswith(said) for remark in tunery.check("task.yaml").remarks)
    watching = Watching()
    run = tunery.train("task.yaml", ["train.max_steps=1"], progress=watching)
    for texts in (watching.said, run.receipt["warnings"]):
        assert len([text for text in texts if text.startswith(said)]) == 1
    assert adapter(run).keys() == tensors.keys()


def test_an_adapter_of_another_base_is_remarked_wherever_it_counts(project: Path) -> None:
    other = config_of(project / "start") | {"base_model_name_or_path": "/home/someone/models/other-llama"}
    (project / "start" / "adapter_config.json").write_text(json.dumps(other))
    watching = Watching()
    run = tunery.train("task.yaml", ["train.max_steps=1"], progress=watching)
    said = "the adapter it starts from was trained on other-llama, and the base is tiny-llama"
    assert said in tunery.check("task.yaml").remarks
    assert said in watching.said
    assert said in run.receipt["warnings"]
    assert "/home/someone" not in (run.path / "adapter" / "README.md").read_text()


def test_an_adapter_of_peft_with_exceptions_is_trained_on_as_it_is(project: Path, base_folder: Path) -> None:
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), settings)
    config = {"base_model_name_or_path": str(base_folder), "init_lora_weights": True}
    model.save_pretrained(str(project / "theirs"))
    (project / "theirs" / "adapter_config.json").write_text(json.dumps(config_of(project / "theirs") | config))
    run = tunery.train("task.yaml", ["lora.start=theirs", "train.max_steps=2"], progress=QUIET)
    saved = config_of(run.path / "adapter")
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (4, 8, True)
    assert saved["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 2}
    assert saved["target_modules"] == ["q_proj", "v_proj"]
    assert {name: t.shape for name, t in adapter(run).items()} == {
        name: t.shape for name, t in adapter(project / "theirs").items()
    }
