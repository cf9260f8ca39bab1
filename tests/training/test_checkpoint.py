"""Checkpoints are whole or absent, and hold everything that the next step needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunery.config import TrainConfig
from tunery.errors import AdapterError, CheckpointError
from tunery.lora.adapter import WEIGHTS_FILE
from tunery.training.checkpoint import Checkpoints, TrainerState, export_checkpoint
from tunery.training.loop import make_optimizer

TASK = {"model": "m", "name": "a", "lora": {"rank": 4}, "train": {"batch_size": 8, "save_limit": 2}}


def make(folder: Path, task: dict | None = None, rows: str = "r") -> Checkpoints:
    inputs = {"the training rows": rows, "the base model": "b"}
    return Checkpoints(folder / "checkpoints", task or TASK, inputs, {"peft_type": "LORA"})


def adapter_and_optimizer(steps: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    adapter = {f"t{i}": torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for i in range(2)}
    optimizer = make_optimizer(adapter, TrainConfig())
    for step in range(steps):
        one_step(adapter, optimizer, step)
    return adapter, optimizer


def one_step(adapter: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1 / (step + 1)
    for index, tensor in enumerate(adapter.values()):
        tensor.grad = torch.full_like(tensor, 0.3 * step + index + 0.1)
    optimizer.step()


def test_a_restored_state_takes_the_same_next_steps(tmp_path: Path) -> None:
    adapter, optimizer = adapter_and_optimizer(5)
    checkpoints = make(tmp_path)
    path = checkpoints.save(adapter, optimizer, TrainerState(step=5, best_loss=0.5, resumed_from=(2,)))
    fresh, fresh_optimizer = adapter_and_optimizer(0)
    progress = checkpoints.load(path, fresh, fresh_optimizer)
    assert (progress.step, progress.best_loss, progress.resumed_from) == (5, 0.5, (2,))
    for step in range(5, 8):
        one_step(adapter, optimizer, step)
        one_step(fresh, fresh_optimizer, step)
    assert all(torch.equal(adapter[name], fresh[name]) for name in adapter)


def test_the_whole_optimizer_state_goes_to_the_parameters_device_and_format(tmp_path: Path) -> None:
    """A GPU's fused AdamW refuses a count of steps that stayed on the CPU."""
    adapter, optimizer = adapter_and_optimizer(3)
    checkpoints = make(tmp_path)
    path = checkpoints.save(adapter, optimizer, TrainerState(step=3))
    elsewhere = {name: torch.nn.Parameter(tensor.detach().to("meta")) for name, tensor in adapter.items()}
    restored = torch.optim.AdamW(list(elsewhere.values()), lr=0.0)
    checkpoints.load(path, elsewhere, restored)
    for parameter in elsewhere.values():
        assert set(restored.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
        for value in restored.state[parameter].values():
            assert (value.device.type, value.dtype) == ("meta", torch.float32)


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunery.training import checkpoint

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    adapter, optimizer = adapter_and_optimizer(1)
    monkeypatch.setattr(checkpoint, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path).save(adapter, optimizer, TrainerState(step=1))
    assert make(tmp_path).steps() == []
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    adapter, optimizer = adapter_and_optimizer(1)
    checkpoints = make(tmp_path)
    for step in (10, 2, 30, 4):
        checkpoints.save(adapter, optimizer, TrainerState(step=step))
    checkpoints.prune(2, best=2)
    assert checkpoints.steps() == [2, 10, 30]


@pytest.mark.parametrize("name", ["state.json", "adapter_model.safetensors", "optimizer.safetensors"])
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    adapter, optimizer = adapter_and_optimizer(1)
    path = make(tmp_path).save(adapter, optimizer, TrainerState(step=1))
    (path / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        make(tmp_path).load(path, adapter, optimizer)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        make(tmp_path).load(path, adapter, optimizer)


def test_settings_that_leave_the_update_alone_may_change_and_others_may_not(tmp_path: Path) -> None:
    adapter, optimizer = adapter_and_optimizer(1)
    path = make(tmp_path).save(adapter, optimizer, TrainerState(step=1))
    neutral = {**TASK, "name": "b", "train": {"batch_size": 8, "save_limit": 9}}
    assert make(tmp_path, neutral).load(path, adapter, optimizer).step == 1
    with pytest.raises(CheckpointError, match=r"lora\.rank: 4 → 8"):
        make(tmp_path, {**TASK, "lora": {"rank": 8}}).load(path, adapter, optimizer)
    with pytest.raises(CheckpointError, match=r"changed since .*the training rows"):
        make(tmp_path, rows="other").load(path, adapter, optimizer)


def test_the_adapter_of_a_step_is_copied_out_whole_or_not_at_all(tmp_path: Path) -> None:
    adapter, optimizer = adapter_and_optimizer(2)
    make(tmp_path / "run").save(adapter, optimizer, TrainerState(step=2))
    target = export_checkpoint(tmp_path / "run", 2, tmp_path / "out" / "step-2")
    assert {file.name for file in target.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in load_file(target / WEIGHTS_FILE).items())
    assert export_checkpoint(tmp_path / "run", 2, target) == target  # again, over the first
    with pytest.raises(CheckpointError, match="no checkpoint of step 3") as error:
        export_checkpoint(tmp_path / "run", 3, tmp_path / "out" / "step-3")
    assert "it has 2;" in str(error.value.hint)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["step-2"]


def test_exporting_never_replaces_what_is_no_adapter(tmp_path: Path) -> None:
    adapter, optimizer = adapter_and_optimizer(1)
    make(tmp_path / "run").save(adapter, optimizer, TrainerState(step=1))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(AdapterError, match="is not an adapter folder"):
        export_checkpoint(tmp_path / "run", 1, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
