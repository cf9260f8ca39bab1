"""Adapters of wrapped models, and adapters that others made with other names, flags and methods."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.lora.test_adapter import F64, in_peft, made_by_peft, refused, relative
from tests.lora.test_attach import logits, randomise
from tests.support.shapes import tiny_model
from tests.support.wrappers import compiled, compiled_layers, distributed
from tests.tiny import save_tiny_llama
from tunery.errors import AdapterError
from tunery.fast.adapters import apply_lora
from tunery.lora.adapter import WEIGHTS_FILE, lines_to_merge, load_adapter, merged_folder, save_adapter
from tunery.lora.attach import lora_layers
from tunery.models.load import load_base

WRAPS = [compiled, compiled_layers, nn.DataParallel, distributed, lambda model: compiled(nn.DataParallel(model))]


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_adapter_of_a_wrapped_model_has_the_names_of_the_modules_inside(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    plain = apply_lora(tiny_model("llama", F64), rank=2)
    randomise(plain)
    save_adapter(plain, tmp_path / "plain")
    model = wrap(apply_lora(tiny_model("llama", F64), rank=2))
    randomise(model)
    save_adapter(model, tmp_path / "wrapped")
    there, here = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("wrapped", "plain"))
    assert list(there) == list(here)
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("wrapped", "plain")]
    assert configs[0] == configs[1]
    assert relative(in_peft("llama", tmp_path / "wrapped"), logits(plain)) < 1e-10


@pytest.mark.parametrize("wrap", [compiled, compiled_layers, nn.DataParallel])
def test_a_wrapped_model_is_adapted_as_the_one_inside(wrap: Callable[[nn.Module], nn.Module], folder: Path) -> None:
    expected = tiny_model("llama")
    load_adapter(expected, folder)
    model = wrap(tiny_model("llama"))
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(expected))
    again = apply_lora(wrap(tiny_model("llama")), rank=2, targets="attention")
    assert len(lora_layers(again)) == 8


HUB = "/home/a/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de289a04d12100db370d81485cdf75e47ca"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("owner/base", "owner/base"),
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (HUB, "Qwen/Qwen3-0.6B"),
        ("/models/mine", "/models/mine"),
    ],
)
def test_the_base_is_named_as_others_can_resolve_it(given: str, written: str, tmp_path: Path) -> None:
    model = apply_lora(tiny_model("llama"), rank=2)
    save_adapter(model, tmp_path / "told", base_model=given)
    model.config._name_or_path = model.name_or_path = given
    save_adapter(model, tmp_path / "known")
    for name in ("told", "known"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == written


RENAMES: dict[str, Callable[[str], str]] = {
    "a compiled model": lambda key: f"_orig_mod.{key}",
    "a compiled model inside peft": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled layers": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "data parallel": lambda key: f"module.{key}",
    "a model that sees pictures": lambda key: key.replace("model.layers", "model.language_model.layers"),
    "a text model alone": lambda key: key.replace("model.layers", "layers"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "the name in memory": lambda key: key.replace(".weight", ".default.weight"),
    "several at once": lambda key: "module._orig_mod." + key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_names_that_wrappers_left_are_understood_and_said(rename: Callable[[str], str], folder: Path) -> None:
    expected = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of PEFT's own names nothing is said
        load_adapter(expected, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match=r"tensors of .* have other names .* taken for a part of model\.layers\.0\."):
        load_adapter(model, folder)
    assert torch.equal(logits(model), logits(expected))


def test_a_copy_of_the_embedding_is_one_under_another_name_too(tmp_path: Path) -> None:
    expected = made_by_peft("llama", tmp_path, r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({f"_orig_mod.{key}": tensor for key, tensor in tensors.items()}, tmp_path / WEIGHTS_FILE)
    model = tiny_model("llama", F64)
    with pytest.warns(UserWarning, match="other names"):
        load_adapter(model, tmp_path)
    assert relative(logits(model), expected) < 1e-10


def test_names_of_two_adapters_are_not_mixed(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    twice = {
        key.replace(".weight", f".{name}.weight"): tensor for key, tensor in tensors.items() for name in ("a", "b")
    }
    save_file({key: tensor.clone() for key, tensor in twice.items()}, folder / WEIGHTS_FILE)
    refused(folder, "twice, so it is not one adapter")


def test_strange_names_are_shown_beside_the_models_own(folder: Path) -> None:
    with pytest.raises(AdapterError, match="28 of its 28") as error:
        load_adapter(tiny_model("gpt2"), folder)
    assert error.value.hint is not None
    assert "this model's layers are called transformer.h.0.attn.c_attn" in error.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"corda_method": "ipm"}),
        ("ensure_weight_tying", True),
        ("lora_dtype", "float32"),
        ("auto_mapping", {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}),
        ("inference_mode", False),
        ("a_method_of_next_year", None),
    ],
)
def test_flags_that_do_not_change_the_output_pass(folder: Path, key: str, value: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    load_adapter(tiny_model("llama"), folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "use_dora": True},
        {"trainable_token_indices": {"embed_tokens": [3, 4]}},
        {"bias": "lora_only"},
    ],
    ids=["modules_to_save", "modules_to_save beside DoRA", "trainable_token_indices", "bias"],
)
def test_what_is_refused_comes_with_the_two_lines_that_merge_it(settings: dict[str, Any], tmp_path: Path) -> None:
    base, folder = save_tiny_llama(tmp_path / "base"), tmp_path / "adapter"
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **settings)
    with_bias = AutoConfig.from_pretrained(base, attention_bias=True)
    AutoModelForCausalLM.from_config(with_bias).save_pretrained(base)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(str(folder))
    with pytest.raises(AdapterError, match="a method that is not known here") as error:
        load_adapter(AutoModelForCausalLM.from_pretrained(base), folder)
    lines = lines_to_merge(folder)
    assert len(lines) == 2
    assert error.value.hint is not None
    assert all(line in error.value.hint for line in lines)
    exec("\n".join(lines), {})
    merged = load_base(str(merged_folder(folder)), precision="float32", device="cpu").model
    wanted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    assert relative(logits(merged), logits(wanted.eval())) < 1e-5
    assert relative(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base))) > 1e-3
