"""Every format of every shape comes back, in the program it is for, within its limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunery
from tests.export.runs import QUIET, make_run, save_base
from tunery.errors import ConfigError
from tunery.export import weights as weights_module
from tunery.export.export_run import Export
from tunery.export.subject import open_run
from tunery.export.targets import TARGETS

SHAPES = ("llama", "gpt2", "qwen3")


def export(run: Path, to: str, out: Path, quantize: str | None = None, **more: object) -> Export:
    return tunery.export_run(run, to, quantize=quantize, out=out, device="cpu", progress=QUIET, **more)  # type: ignore[arg-type]


def check(done: Export, form: str, numbers: str) -> None:
    """What holds of every export."""
    record = json.loads((done.path / "export.json").read_text())
    assert record == done.record
    assert (record["format"], record["numbers"]) == (form, numbers)
    comparison = record["comparison"]
    limits = TARGETS[form].limits(numbers if form != "gguf-adapter" else "f32")
    assert comparison["difference"]["positions"] >= 16
    assert comparison["difference"]["mean_difference"] <= limits.mean
    assert comparison["difference"]["max_difference"] <= limits.maximum
    assert comparison["difference"]["kl"] <= limits.kl
    assert comparison["difference"]["agreement"] >= limits.agreement
    assert comparison["identical_prompts"] == 8
    assert comparison["identical_texts"] == 8
    assert comparison["update"]["layers"] in (8, 14)
    assert record["rows"] == {"origin": "validation", "count": 8}
    assert set(record["files"]) == {
        str(p.relative_to(done.path)) for p in done.path.rglob("*") if p.is_file() and p.name != "export.json"
    }
    assert (done.path / "README.md").is_file()
    assert not list(done.path.parent.glob(".*"))


@pytest.mark.parametrize("shape", SHAPES)
def test_peft(run_of: Callable[[str], Path], shape: str, tmp_path: Path) -> None:
    done = export(run_of(shape), "peft", tmp_path / "out")
    check(done, "peft", "float32")
    assert done.record["comparison"]["runtime"].startswith("peft ")
    same = (run_of(shape) / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (done.path / "adapter_model.safetensors").read_bytes() == same


@pytest.mark.parametrize("shape", SHAPES)
def test_merged(run_of: Callable[[str], Path], shape: str, tmp_path: Path) -> None:
    done = export(run_of(shape), "merged", tmp_path / "out")
    check(done, "merged", "float32")
    tuned = tunery.load(run_of(shape), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    asked = [{"role": "user", "content": "how is film 3?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(done.path)(ids).logits
        assert torch.allclose(merged, tuned.model(ids).logits, atol=1e-3)


@pytest.mark.parametrize("numbers", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gguf(run_of: Callable[[str], Path], shape: str, numbers: str, tmp_path: Path) -> None:
    done = export(run_of(shape), "gguf", tmp_path / "out", numbers)
    check(done, "gguf", numbers)
    assert done.record["comparison"]["runtime"].startswith("xllamacpp ")
    file = gguf.GGUFReader(done.path / f"films-{numbers}.gguf")
    assert (
        file.fields["tokenizer.chat_template"].contents() == tunery.load(run_of(shape)).renderer.tokenizer.chat_template
    )
    kinds = {tensor.tensor_type.name.lower() for tensor in file.tensors if len(tensor.shape) > 1}
    assert kinds - {"f32"} == ({numbers} - {"f32"})


@pytest.mark.parametrize("shape", ["qwen2", "mistral", "gemma", "gemma2", "gemma3"])
def test_gguf_of_further_shapes(run_of: Callable[[str], Path], shape: str, tmp_path: Path) -> None:
    check(export(run_of(shape), "gguf", tmp_path / "out"), "gguf", "f16")


@pytest.mark.parametrize("numbers", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_adapter(run_of: Callable[[str], Path], shape: str, numbers: str, tmp_path: Path) -> None:
    done = export(run_of(shape), "gguf-adapter", tmp_path / "out", numbers)
    check(done, "gguf-adapter", numbers)
    assert [p.name for p in done.path.glob("*.gguf")] == [f"films-adapter-{numbers}.gguf"]  # the trial's base is gone


@pytest.mark.parametrize("shape", SHAPES)
def test_ollama(run_of: Callable[[str], Path], shape: str, tmp_path: Path) -> None:
    done = export(run_of(shape), "ollama", tmp_path / "out", "f16")
    check(done, "ollama", "f16")
    lines = (done.path / "Modelfile").read_text()
    assert lines.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in lines


@pytest.mark.parametrize("numbers", ["q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m"])
def test_fewer_bits(numbers: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """A model wide enough for k-quants, whose logits are as calm as a real one's."""
    done = export(wide_run(tmp_path_factory), "gguf", tmp_path / "out", numbers)
    check(done, "gguf", numbers)
    file = gguf.GGUFReader(done.path / f"films-{numbers}.gguf")
    main = numbers.removesuffix("_m").upper()
    assert main in {tensor.tensor_type.name for tensor in file.tensors}


_wide: list[Path] = []


def wide_run(factory: pytest.TempPathFactory) -> Path:
    if not _wide:
        folder = factory.mktemp("wide")
        base = save_base(
            folder / "base", "llama", hidden_size=256, intermediate_size=512, head_dim=64, initializer_range=0.03
        )
        _wide.append(make_run(folder, base))
    return _wide[0]


@pytest.mark.parametrize("kind", ["classification", "completion"])
def test_rows_of_other_kinds(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama"), kind)
    for to in ("merged", "gguf", "ollama"):
        check(export(run, to, tmp_path / to), to, {"merged": "float32", "gguf": "f16", "ollama": "q8_0"}[to])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_sixteen_bits_keeps_its_format(dtype: torch.dtype, tmp_path: Path) -> None:
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama", dtype))
    name = str(dtype).removeprefix("torch.")
    done = export(run, "merged", tmp_path / "merged")
    check(done, "merged", name)
    assert {t.dtype for t in load_file(done.path / "model.safetensors").values()} == {dtype}
    check(export(run, "peft", tmp_path / "peft"), "peft", "float32")
    done = export(run, "gguf-adapter", tmp_path / "adapter")
    assert (
        done.record["comparison"]["limits"] == TARGETS["gguf"].limits({"bfloat16": "bf16"}.get(name, "f16")).as_dict()
    )


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("targets", ["[all-linear, {embedding}]", "[all-linear, lm_head]"])
def test_tied_weights_come_apart(shape: str, targets: str, tmp_path: Path) -> None:
    targets = targets.format(embedding="wte" if shape == "gpt2" else "embed_tokens")
    run = make_run(tmp_path, save_base(tmp_path / "base", shape, tied=True), "chat", f"lora.targets={targets}")
    done = export(run, "merged", tmp_path / "merged")
    assert json.loads((done.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(done.path / "model.safetensors")
    assert done.record["comparison"]["update"]["layers"] in (9, 15)
    done = export(run, "gguf", tmp_path / "gguf")
    assert "output.weight" in {t.name for t in gguf.GGUFReader(next(done.path.glob("*.gguf"))).tensors}
    with pytest.raises(ConfigError, match="one tensor in a GGUF file"):
        export(run, "gguf-adapter", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_embedding_that_is_not_tied_has_a_place_in_a_gguf_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", tied=False)
    run = make_run(tmp_path, base, "chat", "lora.targets=[all-linear, embed_tokens, lm_head]")
    assert export(run, "gguf-adapter", tmp_path / "out").record["comparison"]["update"]["layers"] == 16


def test_gemma_2_has_no_place_for_a_head_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path, save_base(tmp_path / "base", "gemma2"), "chat", "lora.targets=[all-linear, embed_tokens]")
    export(run, "merged", tmp_path / "merged")
    with pytest.raises(ConfigError, match="ties the embedding and head"):
        export(run, "gguf", tmp_path / "gguf")


def test_rank_stabilised_scaling(tmp_path: Path) -> None:
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama"), "chat", "lora.rank_stabilized=true")
    for to, numbers in (("peft", "float32"), ("gguf-adapter", "f32")):
        check(export(run, to, tmp_path / to), to, numbers)


def test_a_base_from_a_gguf_file_is_exported_from_its_converted_copy(
    tmp_path: Path, run_of: Callable[[str], Path]
) -> None:
    base = export(run_of("llama"), "gguf", tmp_path / "first", "q8_0").path / "films-q8_0.gguf"
    run = make_run(tmp_path / "again", base)
    check(export(run, "merged", tmp_path / "merged"), "merged", "float32")
    check(export(run, "gguf", tmp_path / "gguf"), "gguf", "f16")
    done = export(run, "gguf-adapter", tmp_path / "adapter")
    assert done.record["comparison"]["limits"] == TARGETS["gguf-adapter"].limits("q8_0").as_dict()


def test_llama_3s_rotary_scaling(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama", rope_parameters=scaling))
    check(export(run, "gguf", tmp_path / "out", "f32"), "gguf", "f32")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_rotary_scalings(kind: str, tmp_path: Path) -> None:
    scaling = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "linear":
        del scaling["original_max_position_embeddings"]
    run = make_run(tmp_path, save_base(tmp_path / "base", "qwen2", rope_parameters=scaling))
    check(export(run, "gguf", tmp_path / "out", "f32"), "gguf", "f32")


def test_without_held_out_rows_fixed_texts_are_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama"), "chat", "data.validation=null")
    done = export(run, "merged", tmp_path / "out")
    assert done.record["rows"] == {"origin": "fixed texts", "count": 4}
    assert "no held-out rows" in done.record["notes"][0]
    (tmp_path / "rows.jsonl").unlink()
    done = export(run, "merged", tmp_path / "out")
    assert "cannot be read any more" in done.record["notes"][0]


def test_an_earlier_export_is_replaced_and_anything_else_is_not(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    export(run_of("llama"), "merged", tmp_path / "out")
    (tmp_path / "out" / "stray").touch()
    export(run_of("llama"), "merged", tmp_path / "out")
    assert not (tmp_path / "out" / "stray").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ConfigError, match="holds no export"):
        export(run_of("llama"), "merged", tmp_path / "mine")
    with pytest.raises(ConfigError, match="holds no export"):
        export(run_of("llama"), "merged", run_of("llama"))
    assert (run_of("llama") / "receipt.json").exists()


@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_a_quantised_base_is_exported_as_it_was_trained_on(stored: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama"), "chat", f"train.quantize={stored}")
    done = export(run, "merged", tmp_path / "merged")
    check(done, "merged", "float32")
    assert "quantization_config" not in json.loads((done.path / "config.json").read_text())
    check(export(run, "gguf", tmp_path / "gguf"), "gguf", "f16")
    check(export(run, "peft", tmp_path / "peft"), "peft", "float32")


def test_a_quantised_layer_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama"), "chat", "train.quantize=nf4")
    weights = open_run(run, "cpu").weights
    calls: list[str] = []
    unpack = weights_module.unpacked_weight
    monkeypatch.setattr(weights_module, "unpacked_weight", lambda layer: calls.append("") or unpack(layer))
    monkeypatch.setattr(weights_module, "SLICE", 64)
    name = next(iter(weights.deltas))
    parts = [weights.wide(name, rows) for rows in weights.slices(name)]
    assert len(parts) > 1
    assert len(calls) == 1
    assert torch.allclose(torch.cat(parts), weights.wide(name), atol=1e-6)


@pytest.mark.parametrize("targets", ["all-linear", "[all-linear, embed_tokens, lm_head]"])
def test_a_quantised_base_that_computes_in_bfloat16(targets: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", "llama", torch.bfloat16, tied=False)
    settings = ("train.quantize=nf4", "train.precision=bfloat16", f"lora.targets={targets}")
    run = make_run(tmp_path, base, "chat", *settings)
    for to in ("peft", "merged"):
        done = export(run, to, tmp_path / to)
        assert done.record["comparison"]["update"]["layers"] == (14 if targets == "all-linear" else 16)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_conversations_with_tools(shape: str, tmp_path: Path) -> None:
    """GPT-2 gets tunery's own template, which shows tools; ChatML here does not."""
    tool = {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "A film's mark",
            "parameters": {"type": "object", "properties": {"film": {"type": "string"}}},
        },
    }
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"film": "é \\"9\\""}'}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"how is film {i}?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": f"fine, {i} of 42"},
                {"role": "assistant", "content": "It is fine."},
            ],
            "tools": [tool],
        }
        for i in range(20)
    ]
    if shape == "llama":  # its template has no place for a call
        rows = [{"messages": [*row["messages"][:1], row["messages"][-1]], "tools": [tool]} for row in rows]
    base = save_base(tmp_path / "base", shape, max_position_embeddings=1024)
    run = make_run(tmp_path, base, "chat", rows=rows)
    done = export(run, "gguf", tmp_path / "out")
    assert done.record["comparison"]["identical_prompts"] == 8
