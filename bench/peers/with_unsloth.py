"""Unsloth: its own model class and its own recomputation, under TRL's trainer. Needs a CUDA device."""

from __future__ import annotations

import tempfile
from typing import Any

from unsloth import FastLanguageModel  # isort: skip  # it changes trl and transformers while it is imported

from bench.peers import with_trl
from bench.peers.common import Lines, Workload, options

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(work: Workload) -> Any:
    """The base with a fresh adapter, as Unsloth's pages set it up."""
    model, _ = FastLanguageModel.from_pretrained(
        work.base, max_seq_length=max(len(row.ids) for row in work.rows()), dtype=None, load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(
        model, r=work.rank, lora_alpha=int(work.alpha), target_modules=list(LINEAR), lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth", random_state=work.seed,
    )  # fmt: skip


def main() -> None:
    """Train, a step at a time."""
    chosen = options(__doc__ or "")
    lines, work = Lines(), Workload.read(chosen.workload, precision=chosen.precision)
    with tempfile.TemporaryDirectory() as out:
        with_trl.build(work, "tuned", lines, out, model=adapted(work), packages=("unsloth", *with_trl.PACKAGES)).train()
    lines.wait()


if __name__ == "__main__":
    main()
