"""TRL with PEFT and Liger's kernels on the same shape and rows: `yes go | python -m bench.gpu_check.peer [--tiny]`.

Its lines are those of a peer (bench.peers.common.Lines), on stdout. A rehearsal goes without Liger's kernels, which
need a GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tests.tiny import tiny_tokenizer

from bench import gpu, plan
from bench.gpu_check.check import Check
from bench.gpu_check.trainer import random_llama
from bench.peers import with_trl
from bench.peers.common import Lines, Workload

STEPS = 5
MICRO = 4
"""Rows at a time: as many as the batch has, which fit with Liger's kernels."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the workload, train, a step at a time."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.peer", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--micro", type=int, default=MICRO, help="rows at a time")
    options = parser.parse_args(arguments)
    lines = Lines()
    with tempfile.TemporaryDirectory() as folder:
        work, variant = Path(folder), "tuned" if options.tiny else "liger"
        model = _prepared(Check(options.tiny, work), work, options.micro, variant)
        with_trl.build(Workload.read(work), variant, lines, str(work / "out"), model=model).train()
    lines.wait()


def _prepared(check: Check, work: Path, micro: int, variant: str) -> Any:
    """The base with a fresh adapter; tokenizer, rows and settings in the folder."""
    tiny_tokenizer().save_pretrained(work / "base")
    gpu.write_rows(work, MICRO, check.length, STEPS, vocabulary=check.vocabulary)
    settings = gpu.workload_settings(work, "peer", MICRO)
    settings |= {"base": str(work / "base"), "adapter": str(work), "micro_batch": {f"trl-{variant}": micro}}
    (work / "workload.json").write_text(json.dumps(settings), encoding="utf-8")
    model = random_llama(check, check.shape("8b"))
    model.config._name_or_path = str(work / "base")
    lora = LoraConfig(r=plan.RANK, lora_alpha=int(plan.ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    save_file(get_peft_model_state_dict(adapted), work / "adapter_model.safetensors")
    return adapted


if __name__ == "__main__":
    main()
