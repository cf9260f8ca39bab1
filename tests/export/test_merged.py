"""The merged folder: split into files like its base, named like its base, and made in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tunery
from tests.export.runs import QUIET, make_run, save_base
from tunery.errors import ConfigError
from tunery.export.weights import FileWeights


def export(run: Path, out: Path) -> Path:
    return tunery.export_run(run, "merged", out=out, device="cpu", progress=QUIET).path


def test_a_base_in_several_files_gives_a_merge_in_the_same_files(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16, max_shard_size="40KB")
    (base / "LICENSE.txt").write_text("terms")
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    out = export(make_run(tmp_path, base), tmp_path / "out")
    mine, theirs = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, base))
    assert len(set(theirs["weight_map"].values())) > 2
    assert mine["weight_map"] == theirs["weight_map"]
    assert mine["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    for name in set(theirs["weight_map"].values()):
        with safe_open(out / name, "pt") as a, safe_open(base / name, "pt") as b:
            assert sorted(a.keys()) == sorted(b.keys())
            assert a.metadata() == b.metadata()
    assert (out / "LICENSE.txt").read_text() == "terms"
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": 2}
    config = json.loads((out / "config.json").read_text())
    older = {"rope_theta": 10000.0, "rope_scaling": None}  # for transformers before 5
    assert config == json.loads((base / "config.json").read_text()) | older


def test_the_sum_is_rounded_once_and_other_tensors_are_copied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2", torch.bfloat16)
    run = make_run(tmp_path, base)
    out = load_file(export(run, tmp_path / "out") / "model.safetensors")
    before = load_file(base / "model.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], out[name])}
    prefix = "base_model.model."
    assert changed == {
        f"{k.removeprefix(prefix).removesuffix('.lora_A.weight')}.weight" for k in adapter if "lora_A" in k
    }
    for name in changed:
        A, B = (adapter[f"{prefix}{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
        expected = (before[name].float() + 2.0 * (B @ A).t()).bfloat16()
        assert torch.equal(out[name], expected)


def test_files_that_leave_the_first_part_of_a_name_out_keep_their_names(tmp_path: Path) -> None:
    """As the release of GPT-2: "h.0.attn.c_attn.weight", and buffers with masks."""
    base = save_base(tmp_path / "base", "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(base / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.tril(torch.ones(1, 1, 8, 8))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path, base)
    out = load_file(export(run, tmp_path / "out") / "model.safetensors")
    assert set(out) == set(tensors)
    assert not torch.equal(out["h.0.attn.c_attn.weight"], tensors["h.0.attn.c_attn.weight"])
    tunery.export_run(run, "gguf", out=tmp_path / "gguf", device="cpu", progress=QUIET)


def test_a_tied_pair_in_several_files(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", tied=True, max_shard_size="60KB")
    run = make_run(tmp_path, base, "chat", "lora.targets=[q_proj, lm_head]")
    out = export(run, tmp_path / "out")
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert places["lm_head.weight"] == places["model.embed_tokens.weight"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_layer_that_the_files_hold_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers renames some while it loads. Nothing can be merged into such files; an adapter alone can go."""
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama"))
    read = FileWeights.__init__

    def renamed(self: FileWeights, *given: Any) -> None:
        read(self, *given)
        self._places = {name.replace("q_proj", "query"): place for name, place in self._places.items()}

    monkeypatch.setattr(FileWeights, "__init__", renamed)
    for to in ("merged", "gguf", "gguf-adapter", "ollama"):
        with pytest.raises(
            ConfigError, match=r"do not hold model\.layers\.0\.self_attn\.q_proj\.weight.*tunery\.merge"
        ):
            tunery.export_run(run, to, out=tmp_path / "out", device="cpu", progress=QUIET)
        (found,) = tunery.check_destinations(run / "task.yaml", [to])
        assert found.refused
    assert not tunery.check_destinations(run / "task.yaml", ["peft"])
    done = tunery.export_run(run, "peft", out=tmp_path / "out", device="cpu", progress=QUIET)
    assert done.record["comparison"]["update"]["layers"] == 14


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
import tunery
from tests.export.runs import QUIET

def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

run, small, form, out = sys.argv[1:]
tunery.export_run(small, form, out=out + "-small", device="cpu", progress=QUIET)  # fills pools
before, peak, running = held(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, held())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
done = tunery.export_run(run, form, out=out, device="cpu", rows=4, progress=QUIET)
running = False
thread.join()
print(peak - before, before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("form", "dtype", "targets"),
    [
        ("merged", torch.bfloat16, "all-linear"),
        ("gguf", torch.bfloat16, "all-linear"),
        ("merged", torch.float16, "all-linear"),
        ("peft", torch.bfloat16, "[q_proj, embed_tokens, lm_head]"),
        ("gguf-adapter", torch.bfloat16, "[q_proj, embed_tokens, lm_head]"),
    ],
)
def test_memory_stays_within_1_3_times_the_merged_model(
    form: str, dtype: torch.dtype, targets: str, tmp_path: Path
) -> None:
    wanted = f"lora.targets={targets}"
    small_base = save_base(tmp_path / "small-base", "llama", dtype, tied=False)
    small = make_run(tmp_path / "small", small_base, "chat", wanted)
    base = save_base(
        tmp_path / "base",
        "llama",
        dtype,
        tied=False,
        hidden_size=1024,
        intermediate_size=2816,
        head_dim=256,
        initializer_range=0.02,
        **({"num_hidden_layers": 12} if targets == "all-linear" else {"vocab_size": 65536}),
    )
    run = make_run(
        tmp_path / "big",
        base,
        "chat",
        wanted,
        "train.precision=bfloat16",
        "train.max_steps=1",
        "train.batch_size=1",
        "data.validation=1",
    )
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert size > 250e6
    (tmp_path / "measure.py").write_text(MEASURE)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "measure.py"), str(run), str(small), form, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) <= 1.3 * size, done.stdout
