"""Adapter folders: ours in the real peft, peft's here, and everything that must be refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.lora.test_attach import logits, randomise
from tests.support.shapes import EXPERT_SHAPES, SHAPES, tiny_model
from tunery.errors import AdapterError
from tunery.fast.adapters import apply_lora
from tunery.lora.adapter import (
    WEIGHTS_FILE,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter_files,
)
from tunery.lora.attach import (
    active_adapter,
    adapter_names,
    adapter_state,
    attach,
    lora_layers,
    set_active,
    trainable_parameters,
)

F64 = torch.float64


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def embedding_name(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())  # type: ignore[operator]


def in_peft(shape: str, folder: Path, **options: Any) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(tiny_model(shape, F64, **options), str(folder)))


def made_by_peft(shape: str, folder: Path, **settings: Any) -> torch.Tensor:
    """Logits of a random adapter that peft made and saved."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(tiny_model(shape, F64), config)
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    model.save_pretrained(str(folder))
    return logits(model.eval())


@pytest.mark.parametrize("shape", [*SHAPES, *EXPERT_SHAPES])
def test_peft_loads_what_we_save(shape: str, tmp_path: Path) -> None:
    model = tiny_model(shape, F64)
    attach(model, rank=3, alpha=5.0, targets=["all-linear", embedding_name(model), "lm_head"], rank_stabilized=True)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", base_model="tiny")
    assert relative(in_peft(shape, tmp_path / "adapter"), logits(model)) < 1e-10
    ours = tiny_model(shape, F64)
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize("shape", [*SHAPES, *EXPERT_SHAPES])
def test_we_load_what_peft_saves(shape: str, tmp_path: Path) -> None:
    model = tiny_model(shape, F64)
    leaves = {name.rsplit(".", 1)[-1] for name in lora_layers(apply_lora(model, rank=2))}
    targets = [*leaves, embedding_name(model).rsplit(".", 1)[-1], "lm_head"]
    expected = made_by_peft(shape, tmp_path, r=4, lora_alpha=6, target_modules=targets)
    ours = tiny_model(shape, F64)
    load_adapter(ours, tmp_path)
    assert relative(logits(ours), expected) < 1e-10


def test_a_copy_of_the_embedding_passes_before_the_base_is_loaded(tmp_path: Path) -> None:
    made_by_peft("llama", tmp_path, r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])
    assert any("embed_tokens" in name and "lora" not in name for name in load_file(tmp_path / WEIGHTS_FILE))
    with torch.device("meta"):
        empty = tiny_model("llama", F64)
    pieces = read_adapter(dict(empty.named_modules()), tmp_path)
    assert any(name.endswith("embed_tokens") for name in pieces)


def test_patterns_of_rank_and_alpha_survive_both_ways(tmp_path: Path) -> None:
    expected = made_by_peft(
        "llama",
        tmp_path / "peft",
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=r".*(q|v|down)_proj",
        rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 7},
        alpha_pattern={r".*\.1\..*v_proj": 11},
    )
    ours = tiny_model("llama", F64)
    load_adapter(ours, tmp_path / "peft")
    assert relative(logits(ours), expected) < 1e-10
    ranks = {layer.settings["default"].rank for layer in lora_layers(ours).values()}
    assert ranks == {2, 4, 7}
    save_adapter(ours, tmp_path / "ours")
    assert relative(in_peft("llama", tmp_path / "ours"), expected) < 1e-10


def test_a_partly_adapted_model_is_saved_with_full_names(tmp_path: Path) -> None:
    model = tiny_model("gpt2", F64)
    attach(model, rank=2, alpha=4.0, targets="mlp", exclude="transformer.h.0")
    randomise(model)
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
    assert relative(in_peft("gpt2", tmp_path / "a"), logits(model)) < 1e-10


def test_the_files_are_what_other_programs_expect(tmp_path: Path) -> None:
    model = apply_lora(tiny_model("llama", torch.bfloat16), rank=4, dropout=0.1, targets=["attention", "embed_tokens"])
    save_adapter(model, tmp_path / "a", base_model="owner/base")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "bias": "none",
        "base_model_name_or_path": "owner/base",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": ["embed_tokens", "k_proj", "o_proj", "q_proj", "v_proj"],
        "modules_to_save": None,
    }
    assert expected.items() <= config.items()
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (16, 4)
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (4, 96)
    assert set(tensors) == set(adapter_state(model))
    peft.LoraConfig.from_pretrained(str(tmp_path / "a"))
    assert json.loads(_saved_config("gpt2", tmp_path / "b"))["fan_in_fan_out"] is True


def _saved_config(shape: str, folder: Path) -> str:
    save_adapter(apply_lora(tiny_model(shape), rank=2), folder)
    return (folder / "adapter_config.json").read_text()


def test_saving_replaces_an_adapter_but_no_other_folder(tmp_path: Path) -> None:
    model = apply_lora(tiny_model("llama"), rank=2)
    save_adapter(model, tmp_path / "a")
    randomise(model)
    save_adapter(model, tmp_path / "a")
    other = tiny_model("llama")
    load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(AdapterError, match="not replaced"):
        save_adapter(model, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    write_adapter_files(model, tmp_path / "thesis")
    assert len(list((tmp_path / "thesis").iterdir())) == 3
    with pytest.raises(AdapterError, match="no adapter named 'other'"):
        save_adapter(model, tmp_path / "b", "other")
    assert not (tmp_path / "b").exists()


def test_a_loaded_adapter_is_frozen_unless_asked_and_stands_beside_others(tmp_path: Path) -> None:
    model = apply_lora(tiny_model("llama"), rank=2, targets="attention")
    randomise(model)
    save_adapter(model, tmp_path / "a")
    before = logits(model)
    load_adapter(model, tmp_path / "a", "again")
    assert adapter_names(model) == ["default", "again"]
    assert active_adapter(model) == "again"
    assert torch.equal(logits(model), before)
    assert trainable_parameters(model) == []
    set_active(model, "default")
    assert len(trainable_parameters(model)) == 16
    load_adapter(model, tmp_path / "a", "more", trainable=True)
    assert len(trainable_parameters(model)) == 16
    with pytest.raises(AdapterError, match="already"):
        load_adapter(model, tmp_path / "a", "more")


def refused(folder: Path, match: str, shape: str = "llama") -> None:
    """Loading fails with exit code 4 and leaves the model alone."""
    model = tiny_model(shape)
    with pytest.raises(AdapterError, match=match) as error:
        load_adapter(model, folder)
    assert error.value.exit_code == 4
    assert lora_layers(model) == {}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["experts.down_proj"]),
        ("init_lora_weights", "pissa_niter_4"),
        ("layer_replication", [[0, 2]]),
        ("a_method_of_next_year", 3),
    ],
)
def test_methods_beyond_plain_lora_are_refused_by_name(folder: Path, field: str, value: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    refused(folder, f"a method that is not known here; it uses {field}")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read"),
        ("[1]", "holds no settings"),
        ('{"peft_type": "IA3"}', "'IA3', not LORA"),
        ('{"peft_type": "LORA"}', "no sound settings"),
        ('{"peft_type": "LORA", "r": 3, "lora_alpha": 4}', r"not \[3, 32\]"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"(": 3}}', "no sound settings"),
        ('{"peft_type": "LORA", "r": 0, "lora_alpha": 4}', "no sound settings"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "no sound settings"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_broken_configuration_is_refused(folder: Path, text: str, match: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    refused(folder, match)


def test_a_truncated_or_missing_file_is_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "cannot be read")
    file.unlink()
    refused(folder, "is missing")
    refused(folder / "nowhere", "no adapter at")


def test_a_pickled_adapter_is_never_opened(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "sprung",))

    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(folder, "a pickle file")
    assert not (folder / "sprung").exists()


def spoil(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "adapter_model.safetensors"
    tensors: dict[str, Any] = load_file(file) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


def test_every_tensor_must_have_its_place(folder: Path) -> None:
    refused(folder, "28 of its 28 tensors have no place", shape="gpt2")
    place = "base_model__model__model__layers__0__self_attn__q_proj__lora_"
    whole = load_file(folder / "adapter_model.safetensors")
    for changes, match in (
        ({f"{place}A__weight": None}, r"incomplete: model\.layers\.0\.self_attn\.q_proj \(no A\)"),
        ({f"{place}magnitude_vector": torch.ones(32)}, "lora_magnitude_vector"),
        ({f"{place}A__weight": torch.ones(2, 31)}, r"A of model\.layers\.0\.self_attn\.q_proj is \[2, 31\]"),
        ({f"{place}B__weight": torch.full((32, 2), float("nan"))}, "not finite"),
        ({"base_model__model__lm_head__weight": torch.ones(96, 32)}, "lm_head.weight"),
    ):
        spoil(folder, **changes)
        refused(folder, match)
        save_file(whole, folder / "adapter_model.safetensors")
    load_adapter(tiny_model("llama"), folder)


def test_no_tensors_at_all_is_no_adapter(folder: Path) -> None:
    save_file({}, folder / "adapter_model.safetensors")
    refused(folder, "no LoRA tensor")
