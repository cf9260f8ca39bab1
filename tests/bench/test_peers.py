"""What the peers are told, as far as it can be seen without their environments."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bench.peers import with_unsloth
from bench.peers.common import Workload

from bench import environments, plan

SETTINGS = {
    "name": "x",
    "kind": "rows",
    "base": "base",
    "adapter": "adapter",
    "precision": "float32",
    "batch_size": 16,
    "rank": 16,
    "alpha": 32.0,
    "learning_rate": 2e-4,
    "max_grad_norm": 1.0,
    "seed": 7,
    "micro_batch": {"trl-tuned": 8, "unsloth": 4},
}


def workload(folder: Path, lines: list[dict[str, Any]], **changes: Any) -> Workload:
    (folder / "workload.json").write_text(json.dumps(SETTINGS | changes), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Workload.read(folder)


ROWS = [{"ids": [1, 2, 3], "trained": [0, 1, 1]}, {"ids": [1, 2, 3, 4, 5], "trained": [0, 0, 0, 0, 1]}]
PAIRS = [{"prompt": [1, 2], "chosen": [3], "rejected": [4, 5, 6, 7]}, {"prompt": [1], "chosen": [3], "rejected": [4]}]


@pytest.fixture
def with_trl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The peer's module beside a TRL that holds names only."""
    pytest.importorskip("datasets")
    pytest.importorskip("peft")
    trl = ModuleType("trl")
    trl.__spec__ = ModuleSpec("trl", None)
    for name in ("DPOConfig", "DPOTrainer", "SFTConfig", "SFTTrainer"):
        setattr(trl, name, type(name, (), {}))
    monkeypatch.setitem(sys.modules, "trl", trl)
    monkeypatch.delitem(sys.modules, "bench.peers.with_trl", raising=False)
    module = importlib.import_module("bench.peers.with_trl")
    monkeypatch.delitem(sys.modules, "bench.peers.with_trl")
    return module


def test_trl_computes_in_the_dtype_of_the_workload(tmp_path: Path, with_trl: ModuleType) -> None:
    for precision in ("float32", "bfloat16"):
        work = workload(tmp_path, ROWS, precision=precision)
        defaults, tuned = (with_trl.settings(work, variant, 3, "out", 8) for variant in ("defaults", "tuned"))
        assert defaults["bf16"] is tuned["bf16"] is (precision == "bfloat16")
        assert tuned["model_init_kwargs"] == {"dtype": precision}
        assert "model_init_kwargs" not in defaults, "its own: weights in float32"
        assert "gradient_checkpointing" not in defaults
        assert tuned["gradient_checkpointing"] is False
        assert (tuned["per_device_train_batch_size"], tuned["gradient_accumulation_steps"]) == (8, 2)


def fake_unsloth(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An Unsloth that remembers how its model class was called, and whether it was told to use the CPU by then."""
    calls: list[dict[str, Any]] = []

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(base: str, **given: Any) -> tuple[str, None]:
            calls.append({"base": base, "forced": with_unsloth.os.environ.get("UNSLOTH_FORCE_CPU"), **given})
            return "model", None

        @staticmethod
        def get_peft_model(model: str, **given: Any) -> str:
            calls.append({"model": model, **given})
            return "adapted"

    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    monkeypatch.setenv("UNSLOTH_FORCE_CPU", "")
    return calls


@pytest.mark.parametrize(("gpu", "forced", "recomputing"), [(False, "1", False), (True, "", "unsloth")])
def test_unsloth_gets_the_settings_of_the_workload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, forced: str, recomputing: object
) -> None:
    calls = fake_unsloth(monkeypatch)
    assert with_unsloth.adapted(workload(tmp_path, ROWS), gpu) == "adapted"
    loaded, given = calls
    assert loaded == {
        "base": "base",
        "forced": forced,
        "max_seq_length": 5,
        "dtype": torch.float32,
        "load_in_4bit": False,
    }
    assert given["use_gradient_checkpointing"] == recomputing
    assert {key: given[key] for key in ("r", "lora_alpha", "lora_dropout", "random_state")} == {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0,
        "random_state": 7,
    }


def test_unsloth_has_room_for_the_longer_answer_of_a_pair(tmp_path: Path) -> None:
    assert with_unsloth.longest(workload(tmp_path, PAIRS, kind="pairs")) == 6


def test_a_peer_without_a_micro_batch_of_its_own_takes_the_whole_batch(tmp_path: Path) -> None:
    work = workload(tmp_path, ROWS)
    assert [work.micro(name) for name in ("trl-defaults", "trl-tuned", "unsloth")] == [16, 8, 4]


def test_unsloth_trains_every_workload_and_its_versions_are_pinned() -> None:
    assert all("unsloth" in {peer.name for peer in plan.peers_of(chosen)} for chosen in plan.WORKLOADS)
    assert all("unsloth" in chosen.micro_batch for chosen in plan.WORKLOADS)
    (peer,) = (peer for peer in plan.PEERS if peer.name == "unsloth")
    pins = (environments.PINS / f"{peer.environment}.txt").read_text(encoding="utf-8").splitlines()
    assert {"unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "trl==1.15.0", "transformers==5.17.0"} <= set(pins)
    assert all("==" in line or line.startswith("#") for line in pins)


def test_every_peer_has_a_module_and_an_environment() -> None:
    for peer in plan.PEERS:
        assert (plan.ROOT / "bench" / "peers" / f"{peer.module}.py").exists()
        assert (environments.PINS / f"{peer.environment}.txt").exists()
