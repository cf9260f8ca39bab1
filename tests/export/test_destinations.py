"""What a destination refuses is known before any training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tunery
from tests.export.runs import save_base, write_rows
from tests.support.shapes import tiny_model
from tests.tiny import tiny_tokenizer
from tunery.errors import ConfigError


def task(folder: Path, shape: str = "llama", **changes: Any) -> Path:
    if shape == "gpt_neox":
        model = tiny_model(shape, vocab_size=len(tiny_tokenizer()))
        model.save_pretrained(folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
    else:
        save_base(folder / "base", shape, **changes)
    write_rows(folder, "chat")
    (folder / "task.yaml").write_text("model: ./base\ndata:\n  train: rows.jsonl\n")
    return folder / "task.yaml"


def messages(path: Path, destination: str, *settings: str) -> list[tuple[bool, str]]:
    found = tunery.check_destinations(path, [destination], settings)
    assert {finding.destination for finding in found} <= {destination}
    return [(finding.refused, finding.message) for finding in found]


def test_an_ordinary_adapter_goes_everywhere(tmp_path: Path) -> None:
    path = task(tmp_path)
    assert not tunery.check_destinations(path, ["peft", "merged", "vllm", "gguf", "gguf-adapter", "ollama", "hub"])


@pytest.mark.parametrize(
    ("settings", "refused", "words"),
    [
        (["lora.rank=24"], False, "--max-lora-rank 32"),
        (["lora.rank=600"], True, "above 512"),
        (["lora.targets=[q_proj, lm_head]"], False, "for a few kinds of models only"),
        (["train.quantize=nf4"], False, "trained on a base in nf4"),
    ],
)
def test_vllm(settings: list[str], refused: bool, words: str, tmp_path: Path) -> None:
    if "nf4" in settings[0]:
        pytest.importorskip("bitsandbytes")
    (found,) = messages(task(tmp_path), "vllm", *settings)
    assert found[0] is refused
    assert words in found[1]


def test_vllm_with_other_models(tmp_path: Path) -> None:
    (found,) = messages(task(tmp_path, "gpt2"), "vllm")
    assert found == (True, "vLLM serves gpt2 models without adapters: use --to merged")
    (tmp_path / "q").mkdir()
    (found,) = messages(task(tmp_path / "q", "qwen3"), "vllm", "lora.targets=[q_proj, embed_tokens]")
    assert found[0] is True


def test_llama_cpp(tmp_path: Path) -> None:
    (found,) = messages(task(tmp_path, "gpt_neox"), "gguf")
    assert found[0] is True
    assert "models of type gpt_neox" in found[1]
    (tmp_path / "tied").mkdir()
    tied = task(tmp_path / "tied", "llama", tied=True)
    assert not messages(tied, "gguf", "lora.targets=[q_proj, embed_tokens]")
    (found,) = messages(tied, "gguf-adapter", "lora.targets=[q_proj, embed_tokens]")
    assert found[0] is True
    assert "one tensor in a GGUF file" in found[1]
    (tmp_path / "gemma").mkdir()
    (found,) = messages(task(tmp_path / "gemma", "gemma2"), "gguf", "lora.targets=[q_proj, embed_tokens]")
    assert "leave model.embed_tokens, lm_head out" in found[1] or "leave model.embed_tokens out" in found[1]


def test_a_destination_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no destination 'vlm'") as caught:
        tunery.check_destinations(task(tmp_path), ["vlm"])
    assert "vllm" in str(caught.value.hint)


def test_check_for_a_destination_on_the_command_line(tmp_path: Path) -> None:
    task(tmp_path)

    def check(*arguments: str) -> str:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tunery.cli",
                "check",
                "task.yaml",
                "--for",
                "vllm",
                "--for",
                "gguf",
                "--set",
                "lora.rank=64",
                *arguments,
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = check()
    assert "vllm: vLLM needs --max-lora-rank 64" in text
    assert "gguf: nothing against it" in text
    (found,) = json.loads(check("--json"))["destinations"]
    assert (found["destination"], found["refused"]) == ("vllm", False)
