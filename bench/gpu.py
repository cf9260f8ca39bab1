"""tunery against its peers on one CUDA GPU: Llama shapes with random weights, long rows, nothing shared.

    make bench-gpu                            # 8B with every peer, then a 70B shape in NF4 (tunery alone)
    make bench-gpu ARGS="--shape 8b --peers trl-liger"

The losses of random weights are those of guessing, so they say little; the trained tokens are counted all the same. The
8B base (16 GB) and the rows are written to the folder of --work. Writes the section "On a GPU" of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plan, report
from bench.judge import curves_differ, same_work, timed
from bench.measure import Run, together
from bench.run import WORK, heading, say, usable_cores

SHAPES: dict[str, dict[str, int | float | bool]] = {
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "70b": {
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}
"""Of Llama 3.1."""

TUNERY = plan.TUNERY
TUNERY_NF4 = plan.Peer("tunery", "tunery, NF4", "", "with_tunery_nf4")
PEERS = (
    plan.Peer("trl-tuned", "TRL + PEFT, tuned by hand", "gpu", "with_trl", ("--variant", "tuned")),
    plan.Peer("trl-liger", "TRL + PEFT with Liger's kernels", "gpu", "with_trl", ("--variant", "liger")),
    plan.Peer("unsloth", "Unsloth", "unsloth", "with_unsloth"),
)
MICRO = {"trl-tuned": 1, "trl-liger": 4, "unsloth": 1}
"""Rows at a time for TRL, which recomputes nothing here: as many as fit. Liger's head keeps no logits. Unsloth: as TRL
tuned by hand."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--peers", nargs="*", choices=names, default=names)
    parser.add_argument("--batch", type=int, default=4, help="rows a step of the 8B shape; the 70B shape takes one")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one to warm up")
    parser.add_argument("--work", type=Path, default=WORK.with_name("bench-gpu"))
    return parser.parse_args(arguments)


def main() -> None:
    """Write the bases and rows, measure, report. Each program's result is recorded as soon as it is there."""
    options = parse()
    require_gpu()
    results = heading(usable_cores(), device="cuda") | {"length": options.length, "runs": []}
    for shape in options.shape:
        peers = [TUNERY, *(p for p in PEERS if p.name in options.peers)] if shape == "8b" else [TUNERY_NF4]
        folder = write(options.work.resolve(), shape, options.batch if shape == "8b" else 1, options)
        ours: Run | None = None
        for peer in peers:
            say(f"{shape}: {peer.title}")
            (run,) = together([peer], folder, usable_cores(), options.steps + 1, gpu=True)
            ours = ours or run  # tunery comes first
            results["runs"].append(summary(peer.title, shape, run, ours))
            report.save("gpu", results)
    print("\n".join(report.gpu_section(results)))


def require_gpu() -> None:
    """End with one sentence where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench-gpu needs a CUDA GPU, and PyTorch sees none here; `make bench` measures on the CPU")


def summary(title: str, shape: str, run: Run, ours: Run) -> dict[str, Any]:
    """A line of the report: {"title", "shape", "tokens_per_second", "ratio", "peak_bytes", "share"} or "failed"."""
    own = run is ours
    problem = run.get("failed")
    if not problem and not own and not ours.get("failed"):
        problem = same_work(ours, run) or curves_differ(ours, run)
    if problem:
        return {"title": title, "shape": shape.upper(), "failed": problem}
    speed = _speed(run)
    return {
        "title": f"{title}, recomputing activations" if run.get("recomputing") else title,
        "shape": shape.upper(),
        "tokens_per_second": speed,
        "ratio": None if own or ours.get("failed") else _speed(ours) / speed,
        "peak_bytes": max(step["peak_bytes"] for step in run["steps"]),
        "share": _share(run),
        "versions": run["versions"],
    }


def _speed(run: Run) -> float:
    return statistics.median(step["data_tokens"] / step["seconds"] for step in timed(run))


def _share(run: Run) -> float | None:
    shares = [s["flops"] / s["seconds"] / s["matmul_rate"] for s in timed(run) if "matmul_rate" in s]
    return statistics.median(shares) if shares else None


# --------------------------------------------------------------------------- workload


def write(work: Path, shape: str, batch: int, options: argparse.Namespace) -> Path:
    """The base, the adapter and the rows of a shape; returns the workload's folder."""
    folder = work / shape
    folder.mkdir(parents=True, exist_ok=True)
    write_base(work, shape, SHAPES[shape], whole=shape == "8b")
    write_rows(folder, batch, options.length, options.steps + 1)
    settings = workload_settings(work, shape, batch)
    (folder / "workload.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder


def workload_settings(work: Path, shape: str, batch: int) -> dict[str, Any]:
    """The content of workload.json (bench.peers.common.Workload)."""
    return {
        "name": shape,
        "kind": "rows",
        "base": str(work / f"base-{shape}"),
        "adapter": str(work / f"adapter-{shape}"),
        "precision": "bfloat16",
        "batch_size": batch,
        "rank": plan.RANK,
        "alpha": plan.ALPHA,
        "learning_rate": 2e-4,
        "max_grad_norm": plan.MAX_GRAD_NORM,
        "seed": plan.SEED,
        "micro_batch": MICRO,
    }


def write_rows(folder: Path, batch: int, length: int, steps: int, vocabulary: int = 40_000) -> None:
    """Random tokens, all of them trained but the first."""
    import numpy as np

    rng = np.random.default_rng(plan.SEED)
    trained = [0] + [1] * (length - 1)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(batch * steps):
            file.write(json.dumps({"ids": rng.integers(0, vocabulary, length).tolist(), "trained": trained}) + "\n")


def write_base(work: Path, name: str, shape: Mapping[str, Any], *, whole: bool) -> None:
    """A Llama of this shape in `base-NAME`: its configuration and a tokenizer, and if `whole` random weights and an
    adapter to start from. What is there already is kept."""
    import torch
    from tests.tiny import tiny_tokenizer  # any will do: the rows are random tokens
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunery.lora.adapter import save_adapter
    from tunery.lora.attach import attach

    base, adapter = work / f"base-{name}", work / f"adapter-{name}"
    config = LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    config.architectures = ["LlamaForCausalLM"]
    if not (base / "config.json").exists():
        tiny_tokenizer().save_pretrained(base)
        config.save_pretrained(base)
    if whole and not (adapter / "adapter_config.json").exists():
        torch.manual_seed(plan.SEED)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model.save_pretrained(base)
        attach(model, rank=plan.RANK, alpha=plan.ALPHA, seed=plan.SEED)
        save_adapter(model, adapter, base_model=str(base))
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
