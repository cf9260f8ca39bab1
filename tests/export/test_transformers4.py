"""What tunery writes is read by transformers 4.57 as by 5: the same tokens, the same logits, also far apart.

The other version lies in an environment of its own, which `make test-exports` makes; without it they are skipped.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import tunery
from tests.export.runs import QUIET, byte_level, make_run, save_base, sentencepiece
from tests.support import read_in_transformers4
from tests.support.shapes import EXPERT_SHAPES, SHAPES, tiny_model
from tunery.export.subject import TEXTS
from tunery.models.load import attention_settings
from tunery.models.portable import portable_config, save_tokenizer
from tunery.paths import read_json, write_json

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("TUNERY_TRANSFORMERS4", ROOT / ".venv-transformers4" / "bin" / "python"))

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="needs an environment with transformers 4.57: make test-exports"
)

SAID = [{"role": "user", "content": "how is film 3?"}]
IDS = [(7 * i) % 90 + 3 for i in range(200)]
"""Long enough that a rotary embedding with another base gives other logits."""

FAR = {"rope_type": "default", "rope_theta": 500.0}
"""No model's own base, so that a reader who takes that one is found out."""

ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64},
}
EXPORTED = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")
BARE = {
    **{shape: (shape, {"rope_parameters": FAR} if shape not in ("gpt2", "opt", "gemma3") else {}) for shape in SHAPES},
    **{shape: (shape, {"rope_parameters": FAR}) for shape in EXPERT_SHAPES},
    **{f"llama-{name}": ("llama", {"rope_parameters": rope}) for name, rope in ROTARY.items()},
    "gemma3": (
        "gemma3",
        {"rope_parameters": {"full_attention": ROTARY["linear"], "sliding_attention": {**FAR, "rope_theta": 50.0}}},
    ),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {**FAR, "partial_rotary_factor": 0.5}}),
    "phi3": ("phi3", {"rope_parameters": {**FAR, "partial_rotary_factor": 0.5}}),
}
"""Name → shape and changes: models whose configuration alone is looked at."""


@dataclass(frozen=True)
class Found:
    """What transformers 4.57 found, by the name of the job; what transformers 5 computes from the same folders."""

    facts: dict[str, Any]
    logits: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    jobs: dict[str, dict[str, Any]]


def logits_here(folder: Path, ids: list[int]) -> torch.Tensor:
    """Of a model folder in transformers 5."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    more = attention_settings(model.config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **more).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def loaded_as(kind: str, folder: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreTrainedTokenizerBase:
    """A tokenizer as the class of one model loads it."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    write_json(file, {**read_json(file), "tokenizer_class": kind, **settings})
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def tokenizers(folder: Path) -> dict[str, PreTrainedTokenizerBase]:
    """Of several families, as bases bring them."""
    with_more = byte_level()
    with_more.add_special_tokens({"extra_special_tokens": ["<|tool|>", "<|image|>"]})
    named = byte_level()
    named.add_special_tokens({"extra_special_tokens": ["<|image|>"]})
    return {
        "byte-level": byte_level("llama-bpe"),
        "more special tokens": with_more,
        "a named special token": loaded_as("TokenizersBackend", folder / "n", named, image_token="<|image|>"),
        "gpt2": loaded_as("GPT2Tokenizer", folder / "g", byte_level("gpt-2")),
        "qwen2": loaded_as("Qwen2Tokenizer", folder / "q", byte_level("qwen2")),
        "llama without a beginning": loaded_as("LlamaTokenizer", folder / "l", sentencepiece(), add_bos_token=False),
        "llama": loaded_as("LlamaTokenizer", folder / "b", sentencepiece(), add_bos_token=True, padding_side="left"),
        "gemma": loaded_as("GemmaTokenizer", folder / "s", sentencepiece()),
    }


TOKENIZERS = (
    "byte-level",
    "more special tokens",
    "a named special token",
    "gpt2",
    "qwen2",
    "llama without a beginning",
    "llama",
    "gemma",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Everything is written first, and read by one process."""
    folder = tmp_path_factory.mktemp("transformers4")
    jobs: dict[str, dict[str, Any]] = {}
    expected: dict[str, torch.Tensor] = {}
    for shape in EXPORTED:
        _export(shape, folder / shape, jobs, expected)
    for name, (shape, changes) in BARE.items():
        at = folder / "bare" / name
        tiny_model(shape, **changes).save_pretrained(at)
        write_json(at / "config.json", portable_config(read_json(at / "config.json")))
        expected[f"bare {name}"] = logits_here(at, IDS)
        jobs[f"bare {name}"] = {"model": str(at), "ids": IDS}
    for name, tokenizer in tokenizers(folder / "made").items():
        at = folder / "tokenizers" / name
        save_tokenizer(tokenizer, at)
        jobs[f"tokenizer {name}"] = {"tokenizer": str(at), "texts": TEXTS, "messages": SAID}
    files = [folder / name for name in ("jobs.json", "found.safetensors", "found.json")]
    write_json(files[0], jobs)
    script = read_in_transformers4.__file__
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([str(PYTHON), script, *map(str, files)], check=True, env=environment, capture_output=True)
    return Found(read_json(files[2]), load_file(files[1]), expected, jobs)


def _export(shape: str, folder: Path, jobs: dict[str, dict[str, Any]], expected: dict[str, torch.Tensor]) -> None:
    """A run and its exports, with what is to be read of them."""
    far: dict[str, Any] = {} if shape in ("gpt2", "gemma3") else {"rope_parameters": FAR}
    base = save_base(folder / "base", shape, **far)
    run = make_run(folder, base)
    for form in ("merged", "peft"):
        tunery.export_run(run, form, out=folder / form, device="cpu", progress=QUIET)
    jobs[f"merged {shape}"] = {"model": str(folder / "merged"), "ids": IDS}
    expected[f"merged {shape}"] = logits_here(folder / "merged", IDS)
    # the base itself is not ours to write: as transformers 5 saved it, 4.57 would compute with another rotary base
    write_json(base / "config.json", portable_config(read_json(base / "config.json")))
    jobs[f"peft {shape}"] = {"model": str(base), "adapter": str(folder / "peft"), "ids": IDS}
    expected[f"peft {shape}"] = expected[f"merged {shape}"]
    for name, at in (("merged", "merged"), ("peft", "peft"), ("run", "runs/films/adapter")):
        jobs[f"tokens {name} {shape}"] = {"tokenizer": str(folder / at), "texts": TEXTS, "messages": SAID}


@pytest.mark.parametrize(
    "name", [*(f"{form} {shape}" for form in ("merged", "peft") for shape in EXPORTED), *(f"bare {n}" for n in BARE)]
)
def test_the_logits_are_those_of_transformers_5(found: Found, name: str) -> None:
    assert "error" not in found.facts[name], found.facts[name]
    assert found.facts[name]["lost"] == []
    mine, theirs = found.expected[name], found.logits[name]
    difference = float((mine - theirs).abs().max() / mine.abs().max())
    assert difference < 1e-4, difference


@pytest.mark.parametrize(
    "name",
    [
        *(f"tokens {form} {shape}" for form in ("merged", "peft", "run") for shape in EXPORTED),
        *(f"tokenizer {name}" for name in TOKENIZERS),
    ],
)
def test_the_tokens_are_those_of_transformers_5(found: Found, name: str) -> None:
    assert "error" not in found.facts[name], found.facts[name]
    assert found.facts[name] == read_in_transformers4.read_tokenizer(found.jobs[name]) | {
        "class": found.facts[name]["class"]
    }


@pytest.mark.parametrize("shape", EXPORTED)
def test_generation_ends_where_the_adapter_was_trained_to_end(found: Found, shape: str) -> None:
    ends = found.facts[f"merged {shape}"]["ends"]
    tokenizer = AutoTokenizer.from_pretrained(Path(found.jobs[f"merged {shape}"]["model"]))
    wanted = "<end_of_turn>" if shape.startswith("gemma") else "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(wanted) in (ends if isinstance(ends, list) else [ends])


def test_it_was_really_the_older_version_that_read(found: Found) -> None:
    assert found.facts["transformers"].startswith("4.57.")
