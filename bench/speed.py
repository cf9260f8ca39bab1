"""Training speed of tunery against PEFT in a bare loop: same rows, order, rank, targets, number format and threads.

    make bench

Both train the same batches of film reviews (examples/sentiment) from the same start. First both take a step in
float32: their losses must agree to 1e-4, or no speed is printed. (In bfloat16 each is a few hundredths away from
float32, since a step here trains few tokens.) Then both run in the format the probe chooses: one warm-up step, and
the median of the following ones. The ratio is the result, since the machine's own speed drifts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tunery.config import Task
from tunery.data.batching import Row, rows_of_step
from tunery.data.prepare import prepare
from tunery.data.read import read_data
from tunery.lora.attach import adapter_state, attach
from tunery.lora.layer import DropoutClock
from tunery.models.device import matmul_rate
from tunery.models.flat import inspect_model
from tunery.models.load import Base, load_base
from tunery.task_file import load_task
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import train_step

TASK = Path(__file__).parent.parent / "examples" / "sentiment" / "task.yaml"
RATE = 2e-4
AGREEMENT = 1e-4
"""Largest relative difference of a step's losses in float32."""

Step = Callable[[Sequence[Row]], float]


def tunery_step(base: Base, rank: int) -> Step:
    """One optimizer step of tunery's loop on a batch; returns its loss."""
    clock = DropoutClock()
    attach(base.model, rank=rank, alpha=2.0 * rank, targets="all-linear", seed=0, clock=clock)
    model, adapter = inspect_model(base.model), adapter_state(base.model)
    optimizer = torch.optim.AdamW(adapter.values(), lr=RATE, weight_decay=0.0)

    def step(rows: Sequence[Row]) -> float:
        result = train_step(model, list(adapter.values()), rows, MicroBatchLimit(len(rows)), clock, (0, 0), None)
        optimizer.step()
        return result.loss

    return step


def peft_step(base: Base, rank: int) -> Step:
    """The same with PEFT: rows padded to the longest, logits at all positions, cross-entropy where a label is."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base.model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def step(rows: Sequence[Row]) -> float:
        width = max(len(row.ids) for row in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), -100)
        for i, row in enumerate(rows):
            tokens = torch.from_numpy(row.ids.astype(np.int64))
            ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
            labels[i, : len(tokens)] = torch.where(torch.from_numpy(row.weights > 0), tokens, -100)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    """Run both, step by step in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64], help="rows per step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    task = load_task(TASK)
    for batch in options.batch:
        _, losses, _ = run(task, batch, options.rank, 1, "float32")
        ours, theirs = (values[0] for values in losses.values())
        if abs(ours - theirs) > AGREEMENT * theirs:
            sys.exit(f"batch {batch}: the losses differ in float32 ({ours}, {theirs}), so no speed is printed")
        report(batch, *run(task, batch, options.rank, options.steps + 1, "auto"))


def run(
    task: Task, batch: int, rank: int, steps: int, precision: str
) -> tuple[dict[str, list[float]], dict[str, list[float]], Base]:
    """Both in turn, step by step: (data-set tokens a second, losses, the base), the first two by name."""
    bases = [load_base(task.model, precision=precision) for _ in range(2)]
    rows = prepare(read_data(task.data, 0), task.data, bases[0].tokenizer, 8192).train.rows
    runners = {"tunery": tunery_step(bases[0], rank), "PEFT, bare loop": peft_step(bases[1], rank)}
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    losses: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(steps):
        part = [rows[i] for i in rows_of_step(0, number, len(rows), batch)]
        for name, step in runners.items():
            started = time.perf_counter()
            losses[name].append(step(part))
            speeds[name].append(sum(len(row.ids) for row in part) / (time.perf_counter() - started))
    return speeds, losses, bases[0]


def report(batch: int, speeds: dict[str, list[float]], losses: dict[str, list[float]], base: Base) -> None:
    """Print the median speeds, the first step left out, and their ratio."""
    rate = matmul_rate(base.model.device, base.model.dtype) / 1e9
    medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}
    print(
        f"\nbatch {batch}, {base.info.dtype}, {torch.get_num_threads()} threads, {rate:,.0f} GFLOP/s in matrix products"
    )
    for name, speed in medians.items():
        low, high = min(speeds[name][1:]), max(speeds[name][1:])
        print(
            f"  {name:<16} {speed:8,.0f} data-set tokens/s   ({low:,.0f} to {high:,.0f}), "
            f"mean loss {statistics.mean(losses[name]):.3f}"
        )
    ours, theirs = medians.values()
    print(f"  ratio            {ours / theirs:8.1f}")


if __name__ == "__main__":
    main()
