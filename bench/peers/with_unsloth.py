"""Unsloth: its model class, its LoRA and its loss, under TRL's trainers as it changes them. On a CUDA device or a CPU.

Set beyond what is set for TRL tuned by hand: the dtype of the base, and whether activations are recomputed: on
a GPU by Unsloth's own way, on a CPU not at all.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch

from bench.peers.common import Lines, Workload, options

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def longest(work: Workload) -> int:
    """Tokens of the longest row; of a pair, with its longer answer."""
    if work.kind == "pairs":
        return max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in work.pairs())
    return max(len(row.ids) for row in work.rows())


def adapted(work: Workload, gpu: bool) -> Any:
    """The base with a fresh adapter, as Unsloth's pages set it up."""
    if not gpu:
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
    from unsloth import FastLanguageModel  # not at the top: it prints, and stdout is for lines only

    model, _ = FastLanguageModel.from_pretrained(
        work.base, max_seq_length=longest(work), dtype=getattr(torch, work.precision), load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=work.rank,
        lora_alpha=int(work.alpha),
        target_modules=list(LINEAR),
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if gpu else False,
        random_state=work.seed,
    )


def main() -> None:
    """Train, a step at a time."""
    chosen = options(__doc__ or "")
    lines, work = Lines(), Workload.read(chosen.workload, precision=chosen.precision)
    model = adapted(work, gpu=torch.cuda.is_available())
    from bench.peers import with_trl  # after unsloth, which changes trl and transformers while it is imported

    packages = ("unsloth", *with_trl.PACKAGES)
    with tempfile.TemporaryDirectory() as out:
        with_trl.build(work, "tuned", lines, out, model, packages, peer="unsloth").train()
    lines.wait()


if __name__ == "__main__":
    main()
