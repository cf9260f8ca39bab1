"""LitGPT: its own LoRA GPT (one fused qkv), padded batches, and the chunked head and cross-entropy of its script.

The loop follows litgpt/finetune/lora.py, with the workload's rows. Precision is LitGPT's "bf16-true" or "32-true", so
the adapter is in that format too. Gradients of micro-batches add up to the mean over all trained tokens of the batch.
The checkpoint is converted once by LitGPT's own tool, beside the base.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.utils import chunked_cross_entropy, load_checkpoint
from safetensors.torch import load_file

from bench.peers.common import IGNORED, Lines, Row, Workload, batches, options, train_rows

PACKAGES = ("litgpt", "lightning", "torch")
SHAPE = "SmolLM2-135M-Instruct"
"""The base model's name in LitGPT's list of configurations."""

HEAD_CHUNK = 128
"""As in LitGPT's script."""

NAMES = {
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}
"""transformers' layers → LitGPT's, besides q, k and v, which LitGPT keeps in one."""


def converted(base: Path) -> Path:
    """The folder of the base in LitGPT's format."""
    target = base.with_name(f"{base.name}-litgpt")
    if not (target / "lit_model.pth").exists():
        shutil.copytree(base, target, dirs_exist_ok=True)
        convert_hf_checkpoint(target, model_name=SHAPE)
    return target


def adapter(folder: Path, layers: int) -> dict[str, torch.Tensor]:
    """The workload's adapter under LitGPT's names: A of q, k and v stacked, and B likewise."""
    given = load_file(folder / "adapter_model.safetensors")
    state = {}
    for n in range(layers):
        for kind in ("A", "B"):
            name = f"base_model.model.model.layers.{n}.{{}}.lora_{kind}.weight"
            parts = [given[name.format(f"self_attn.{part}_proj")] for part in "qkv"]
            state[f"transformer.h.{n}.attn.qkv.lora_{kind}"] = torch.cat(parts)
            for theirs, ours in NAMES.items():
                state[f"transformer.h.{n}.{ours}.lora_{kind}"] = given[name.format(theirs)]
    return state


def build(work: Workload) -> tuple[Any, Any]:
    """(fabric, model), the adapter the workload's."""
    checkpoint = converted(Path(work.base))
    on = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    config = Config.from_file(
        checkpoint / "model_config.yaml", lora_r=work.rank, lora_alpha=int(work.alpha), lora_dropout=0.0, **on
    )
    precision = "bf16-true" if work.precision == "bfloat16" else "32-true"
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision=precision)
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    load_checkpoint(fabric, model, checkpoint / "lit_model.pth", strict=False)
    state = adapter(Path(work.adapter), config.n_layer)
    known = dict(model.named_parameters())
    trainable = {name.removeprefix("_forward_module."): p for name, p in known.items() if p.requires_grad}
    if trainable.keys() != state.keys():
        raise SystemExit(f"LitGPT's adapter has other tensors: {sorted(trainable.keys() ^ state.keys())[:3]}")
    with torch.no_grad():
        for name, tensor in state.items():
            trainable[name].copy_(tensor)
    model.max_seq_length = max(len(row.ids) for row in work.rows())
    return fabric, model


def padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), each [rows, longest]. The padding stands behind the rows, where a causal model never looks."""
    shape = len(rows), max(len(row.ids) for row in rows)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], labels[i, : len(row.ids)] = torch.tensor(row.ids), torch.tensor(row.labels)
    return ids, labels


def step(fabric: Any, model: Any, optimizer: Any, rows: list[Row], work: Workload) -> float:
    """One optimizer step; returns the mean loss over the trained tokens."""
    trained = sum(sum(row.trained) for row in rows)
    total = 0.0
    for part in batches(rows, work.micro("litgpt")):
        ids, labels = padded(part)
        logits = model(ids, lm_head_chunk_size=HEAD_CHUNK)
        logits[-1] = logits[-1][..., :-1, :]
        share = sum(sum(row.trained) for row in part) / trained
        loss = chunked_cross_entropy(logits, labels[..., 1:]) * share
        fabric.backward(loss)
        total += float(loss.detach())
    fabric.clip_gradients(model, optimizer, max_norm=work.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def main() -> None:
    """Train, a step at a time."""
    chosen = options(__doc__ or "")
    lines, work = Lines(), Workload.read(chosen.workload, precision=chosen.precision)
    fabric, model = build(work)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(parameters, lr=work.learning_rate, weight_decay=0.0))
    lines.ready(*PACKAGES, trainable=sum(p.numel() for p in parameters))
    train_rows(lines, work, lambda rows: step(fabric, model, optimizer, rows, work))


if __name__ == "__main__":
    main()
