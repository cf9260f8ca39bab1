"""What a step costs against sequence length, rank, batch size, targets and model width, beside the operations it needs.

    make bench-scaling

tunery alone, on the CPU; every point is the median of a few steps after one to warm up. Writes the section "Scaling" of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import plan, report
from bench.peers.common import Workload
from bench.peers.with_tunery import RATE_SECONDS, Trainer, make_row, rows_of
from bench.run import WORK, heading, say, usable_cores, write_workloads
from tunery.data.batching import Row
from tunery.models.device import matmul_rate, resolve_dtype
from tunery.models.load import load_base
from tunery.models.windows import attention_width

STEPS = 2
TOKENS = 2048
"""Tokens of a step while the length of the rows varies."""

LENGTHS = (64, 128, 256, 512, 1024, 2048)
RANKS = (4, 16, 64, 128)
BATCHES = (1, 4, 16, 64, 128)
TARGETS = ("attention", "all-linear")
WIDTHS = (256, 512, 1024, 1536)
WIDTH_LAYERS, WIDTH_ROWS, WIDTH_LENGTH, WIDTH_VOCABULARY = 4, 8, 128, 8192

Point = dict[str, Any]


def measure(trainer: Trainer, rows: Sequence[Row], label: Any) -> Point:
    """The median step over the same rows."""
    model = trainer.model.model
    seconds, rates = [], []
    trainer.start([rows])
    trainer.step(0, rows)
    for number in range(1, STEPS + 1):
        rates.append(matmul_rate(model.device, model.dtype, RATE_SECONDS))
        started = time.perf_counter()
        trainer.step(number, rows)
        seconds.append(time.perf_counter() - started)
    trainer.close()
    sums = trainer.needed(rows)
    attention = 12.0 * attention_width(model.config) * sums.pairs
    point = {
        "at": label, "seconds": statistics.median(seconds), "data_tokens": sums.data_tokens,
        "computed_tokens": sums.computed_tokens, "matmul_rate": statistics.median(rates),
        "flops": trainer.flops(sums), "attention_flops": attention,
    }  # fmt: skip
    share = point["flops"] / point["seconds"] / point["matmul_rate"]
    say(f"  {label}: {point['seconds']:.2f} s, {share:.0%} of the rate")
    return point


def random_rows(count: int, length: int, vocabulary: int) -> list[Row]:
    """Rows that share nothing, all tokens trained."""
    rng = np.random.default_rng(plan.SEED)
    return [
        make_row(rng.integers(0, vocabulary, length).tolist(), [False] + [True] * (length - 1)) for _ in range(count)
    ]


def random_model(width: int, dtype: torch.dtype) -> Any:
    """A small Llama of random weights: heads of 64, a key-value head for four of them, feed-forward 8/3 · width."""
    heads = width // 64
    config = LlamaConfig(
        vocab_size=WIDTH_VOCABULARY, hidden_size=width, intermediate_size=64 * round(width * 8 / 3 / 64),
        num_hidden_layers=WIDTH_LAYERS, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(plan.SEED)
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False).eval()


class Axes:
    """The five measurements, each a list of points."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.templated = [row for batch in rows_of(work) for row in batch]

    def trainer(self, rank: int = plan.RANK, targets: str = "all-linear", model: Any = None) -> Trainer:
        """A fresh adapter on a fresh base."""
        if model is None:
            model = load_base(self.work.base, precision=self.work.precision, device="cpu").model
        settings = {**vars(self.work), "rank": rank, "alpha": 2.0 * rank}
        return Trainer(Workload(**settings), model, targets)

    def length(self) -> Iterator[Point]:
        """Rows of one length, as many as make TOKENS tokens."""
        trainer = self.trainer()
        for length in LENGTHS:
            yield measure(trainer, random_rows(TOKENS // length, length, 40_000), length)

    def rank(self) -> Iterator[Point]:
        """Adapters of different ranks on 16 templated rows."""
        for rank in RANKS:
            yield measure(self.trainer(rank), self.templated[:16], rank)

    def batch(self) -> Iterator[Point]:
        """More templated rows at a time."""
        trainer = self.trainer()
        for size in BATCHES:
            yield measure(trainer, self.templated[:size], size)

    def targets(self) -> Iterator[Point]:
        """Which layers are adapted, on 16 templated rows."""
        for targets in TARGETS:
            yield measure(self.trainer(targets=targets), self.templated[:16], targets)

    def width(self) -> Iterator[Point]:
        """Models of random weights, from narrow to wide."""
        dtype = getattr(torch, self.work.precision)
        for width in WIDTHS:
            rows = random_rows(WIDTH_ROWS, WIDTH_LENGTH, WIDTH_VOCABULARY)
            yield measure(self.trainer(model=random_model(width, dtype)), rows, width)


def main() -> None:
    """Measure all five and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=("length", "rank", "batch", "targets", "width"))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    templated = next(w for w in plan.WORKLOADS if w.name == "classification-64")
    folder = options.work.resolve()
    write_workloads(folder, [templated], 2, checks=False)
    work = Workload.read(folder / templated.name)
    dtype, _ = resolve_dtype("auto", torch.device("cpu"))
    axes = Axes(Workload(**{**vars(work), "precision": str(dtype).removeprefix("torch.")}))
    wanted: list[tuple[str, Callable[[], Iterator[Point]]]] = [
        (name, getattr(axes, name)) for name in options.axis or ("length", "rank", "batch", "targets", "width")
    ]
    results = heading(options.threads) | {"axes": {}}
    for name, points in wanted:
        say(f"scaling with {name}")
        results["axes"][name] = list(points())
    from bench.scaling_report import scaling_section

    print("\n".join(scaling_section(results)))
    if not options.axis:
        report.save("scaling", results)


if __name__ == "__main__":
    main()
