"""An export that is not the adapter is refused with numbers and exit code 4, and nothing of it stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunery
from tests.export.runs import QUIET, make_run, save_base
from tunery.errors import AdapterError, ConfigError
from tunery.export import export_run as export_module
from tunery.export.subject import Subject
from tunery.export.targets import DESTINATIONS, FORMATS, TARGETS
from tunery.lora.layer import LoRATensors

FORMS = ("peft", "merged", "gguf", "gguf-adapter", "ollama")


def refused(run: Path, to: str, out: Path, **more: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        tunery.export_run(run, to, out=out, device="cpu", progress=QUIET, **more)
    assert caught.value.exit_code == 4
    assert not list(out.parent.glob("out*"))
    assert not list(out.parent.glob(".out*"))
    return caught.value


def corrupt(monkeypatch: pytest.MonkeyPatch, form: str, change: Callable[[Subject, Path], Any]) -> None:
    """Do something to an export between writing and checking."""
    write = TARGETS[form].write

    def wrapped(subject: Subject, sample: Any, numbers: str, folder: Path) -> list[str]:
        notes = write(subject, sample, numbers, folder)
        change(subject, folder)
        return notes

    monkeypatch.setattr(TARGETS[form], "write", wrapped)


def write_with_a_zeroed_tensor(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Have one tensor of the adapter be zero while the export is written."""
    write = TARGETS[form].write

    def wrapped(subject: Subject, sample: Any, numbers: str, folder: Path) -> list[str]:
        path = list(subject.pieces)[2]
        whole = dict(subject.pieces)
        deltas = dict(subject.weights.deltas)
        piece = LoRATensors(whole[path].settings, whole[path].A, torch.zeros_like(whole[path].B))
        subject.pieces = {**whole, path: piece}
        name = f"{path}.weight"
        subject.weights.deltas[name] = type(deltas[name])(piece, deltas[name].flipped)
        try:
            return write(subject, sample, numbers, folder)
        finally:
            subject.pieces, subject.weights.deltas = whole, deltas

    monkeypatch.setattr(TARGETS[form], "write", wrapped)


@pytest.mark.parametrize("form", ["merged", "gguf", "gguf-adapter", "ollama"])
@pytest.mark.parametrize("shape", ["llama", "gpt2", "qwen3"])
def test_a_zeroed_tensor(
    run_of: Callable[[str], Path], shape: str, form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_with_a_zeroed_tensor(monkeypatch, form)
    error = refused(run_of(shape), form, tmp_path / "out")
    assert "is not in the export: 0% of it is there" in str(error)


def test_a_zeroed_tensor_of_a_peft_adapter(
    run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def zero(subject: Subject, folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in tensors if name.endswith("v_proj.lora_B.weight"))
        tensors[name].zero_()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    corrupt(monkeypatch, "peft", zero)
    assert "v_proj.weight is not in the export" in str(refused(run_of("llama"), "peft", tmp_path / "out"))


@pytest.mark.parametrize("numbers", ["q4_0", "q3_k_m"])
def test_a_zeroed_tensor_is_found_among_the_errors_of_few_bits(
    numbers: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its update is a tenth of what the rounding does."""
    base = save_base(
        tmp_path / "base", "llama", hidden_size=256, intermediate_size=512, head_dim=64, initializer_range=0.03
    )
    run = make_run(tmp_path, base)
    write_with_a_zeroed_tensor(monkeypatch, "gguf")
    assert "is not in the export" in str(refused(run, "gguf", tmp_path / "out", quantize=numbers))


def test_outputs_outside_the_limits_are_told_with_numbers(
    run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def shift(subject: Subject, folder: Path) -> None:  # a norm that no adapter stands beside
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 1.2
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    corrupt(monkeypatch, "merged", shift)
    error = refused(run_of("llama"), "merged", tmp_path / "out")
    for words in ("mean difference of log-probabilities", "(limit 0.001)", "KL(tuned ‖ exported)", "answer tokens"):
        assert words in str(error)


def test_an_earlier_export_survives_one_that_fails(
    run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = tunery.export_run(run_of("llama"), "merged", out=tmp_path / "out", device="cpu", progress=QUIET)
    write_with_a_zeroed_tensor(monkeypatch, "merged")
    with pytest.raises(AdapterError):
        tunery.export_run(run_of("llama"), "merged", out=tmp_path / "out", device="cpu", progress=QUIET)
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == before.record


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_changed_template_of_a_folder(
    run_of: Callable[[str], Path], form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def change(subject: Subject, folder: Path) -> None:
        file = folder / "chat_template.jinja"
        file.write_text(file.read_text().replace("<|im_start|>assistant", "<|im_start|>bot"))

    corrupt(monkeypatch, form, change)
    assert "chat template is not the one of the training" in str(refused(run_of("llama"), form, tmp_path / "out"))


@pytest.mark.parametrize("form", ["gguf", "ollama"])
def test_a_changed_template_of_a_gguf_file(
    run_of: Callable[[str], Path], form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def change(subject: Subject, folder: Path) -> None:
        file = next(folder.glob("*.gguf"))
        content = file.read_bytes()
        assert content.count(b"<|im_start|>assistant") == 1
        file.write_bytes(content.replace(b"<|im_start|>assistant", b"<|im_start|>assistnat"))

    corrupt(monkeypatch, form, change)
    assert "llama.cpp renders a conversation in another way" in str(refused(run_of("llama"), form, tmp_path / "out"))


def test_a_tokenizer_that_cuts_text_in_another_way(
    run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def change(subject: Subject, folder: Path) -> None:
        file = next(folder.glob("*.gguf"))
        content = file.read_bytes()
        assert content.count(b"smollm") == 1
        file.write_bytes(content.replace(b"smollm", b"falcon"))

    corrupt(monkeypatch, "gguf", change)
    assert "in training" in str(refused(run_of("llama"), "gguf", tmp_path / "out"))


def test_tools_that_llama_cpp_rewrites(tmp_path: Path) -> None:
    """It adds a description to a tool that has none, so the model would see another prompt than in training."""
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    rows = [
        {
            "messages": [{"role": "user", "content": f"film {i}?"}, {"role": "assistant", "content": "fine"}],
            "tools": [tool],
        }
        for i in range(20)
    ]
    base = save_base(tmp_path / "base", "gpt2", max_position_embeddings=1024)
    run = make_run(tmp_path, base, "chat", rows=rows)
    error = refused(run, "gguf", tmp_path / "out")
    assert "llama.cpp renders a conversation in another way" in str(error)
    assert "name, description and parameters" in str(error.hint)


def test_a_file_that_llama_cpp_does_not_load(
    run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut(subject: Subject, folder: Path) -> None:
        file = next(folder.glob("*.gguf"))
        content = file.read_bytes()
        file.write_bytes(content.replace(b"llama.block_count", b"llama.black_count"))

    corrupt(monkeypatch, "gguf", cut)
    assert "llama.cpp does not take films-f16.gguf" in str(refused(run_of("llama"), "gguf", tmp_path / "out"))


def test_an_adapter_that_is_not_the_receipts(tmp_path: Path) -> None:
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama"))
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    assert "not the adapter that" in str(refused(run, "merged", tmp_path / "out"))


@pytest.mark.parametrize(
    ("to", "more", "words"),
    [
        ("nowhere", {}, "nothing is exported to 'nowhere'"),
        ("merged", {"quantize": "q8_0"}, "--quantize has no meaning for merged"),
        ("gguf", {"quantize": "q9"}, "no dtype 'q9'"),
        ("gguf-adapter", {"quantize": "q4_0"}, "an adapter is not written as q4_0"),
        ("hub", {}, "where on the hub"),
        ("hub", {"repo": "me"}, "not a repository"),
        ("gguf", {"dry_run": True}, "--dry-run has no meaning for gguf"),
        ("gguf", {"repo": "me/films"}, "--repo has no meaning"),
        ("gguf", {"private": False}, "--public has no meaning"),
        ("gguf", {"content": "peft"}, "--content has no meaning"),
    ],
)
def test_a_mistake_is_told_before_anything_is_done(
    run_of: Callable[[str], Path],
    to: str,
    more: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(export_module, "open_run", lambda *_: pytest.fail("the run was opened"))
    with pytest.raises(ConfigError, match=words):
        tunery.export_run(run_of("llama"), to, out=tmp_path / "out", device="cpu", progress=QUIET, **more)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_place_in_llama_cpp(tmp_path: Path) -> None:
    from tests.support.shapes import tiny_model
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tiny_model("gpt_neox", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = make_run(tmp_path, tmp_path / "base")
    tunery.export_run(run, "merged", out=tmp_path / "merged", device="cpu", progress=QUIET)
    with pytest.raises(ConfigError, match="models of type gpt_neox cannot be written as GGUF"):
        tunery.export_run(run, "gguf", out=tmp_path / "gguf", device="cpu", progress=QUIET)


def test_the_command_line(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    def tunery_export(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tunery.cli", "export", str(run_of("llama")), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )

    done = tunery_export("--to", "merged", "--out", "merged")
    assert done.returncode == 0, done.stderr
    assert "loaded back in transformers" in done.stdout
    assert "KL(tuned ‖ exported)" in done.stdout
    assert "scoring 8 validation rows" in done.stderr
    done = tunery_export("--to", "merged", "--out", "merged", "--json", "--quiet", "--rows", "3")
    assert done.stderr == ""
    assert json.loads(done.stdout)["export"]["rows"]["count"] == 3
    done = tunery_export("--to", "gguf", "--quantize", "q9")
    assert (done.returncode, done.stdout) == (2, "")
    assert "q4_k_m" in done.stderr


def test_every_target_says_what_the_command_line_the_hub_and_the_checks_need() -> None:
    for name, target in TARGETS.items():
        assert target.name == name
        assert target.about
        assert target.files
        assert target.hub_library
        assert FORMATS[name] == target.about
        assert DESTINATIONS[name] is target
        dtype = target.default_dtype or "float32"
        assert target.limits(dtype).agreement > 0.5
        if target.default_dtype:
            target.check_dtype(target.default_dtype)
            with pytest.raises(ConfigError):
                target.check_dtype("q17")
