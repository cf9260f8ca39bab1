"""PEFT in a bare loop: rows padded to the longest, logits at all positions, cross-entropy where a label is.

The base is in the dtype of the workload, the adapter in float32 (PEFT's rule), the loss in float32. Where a
micro-batch is smaller than the batch, gradients add up to the mean over all trained tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.peers.common import IGNORED, Lines, Row, Workload, batches, options, train_rows

PACKAGES = ("peft", "transformers", "torch")


def build(work: Workload) -> Any:
    """The base with the workload's adapter."""
    base = AutoModelForCausalLM.from_pretrained(work.base, dtype=getattr(torch, work.precision))
    config = LoraConfig(r=work.rank, lora_alpha=int(work.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_file(Path(work.adapter) / "adapter_model.safetensors"))
    return model


def padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, attention mask, labels), each [rows, longest]."""
    shape = len(rows), max(len(row.ids) for row in rows)
    ids, mask, labels = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, IGNORED),
    )
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], mask[i, :n], labels[i, :n] = torch.tensor(row.ids), 1, torch.tensor(row.labels)
    return ids, mask, labels


def step(model: Any, parameters: list[torch.Tensor], optimizer: Any, rows: list[Row], work: Workload) -> float:
    """One optimizer step; returns the mean loss over the trained tokens."""
    trained = sum(sum(row.trained) for row in rows)
    total = 0.0
    for part in batches(rows, work.micro("peft")):
        ids, mask, labels = padded(part)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        targets = labels[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum") / trained
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(parameters, work.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def main() -> None:
    """Train, a step at a time."""
    chosen = options(__doc__ or "")
    lines, work = Lines(), Workload.read(chosen.workload, precision=chosen.precision)
    model = build(work)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=work.learning_rate, weight_decay=0.0)
    lines.ready(*PACKAGES, trainable=sum(p.numel() for p in parameters))
    train_rows(lines, work, lambda rows: step(model, parameters, optimizer, rows, work))


if __name__ == "__main__":
    main()
