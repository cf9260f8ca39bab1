"""The section "Scaling" of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench import plan
from bench.tables import processor, table

REVIEWS = "16 film reviews as chat rows."
ABOUT = {
    "length": ("Sequence length", "tokens per row", "As many rows as make 2,048 tokens; nothing shared, all trained."),
    "rank": ("Rank", "rank", REVIEWS),
    "batch": ("Batch size", "rows", "Film reviews as chat rows: the larger the batch, the more share one instruction."),
    "targets": ("Adapted layers", "targets", REVIEWS),
    "width": (
        "Model width",
        "hidden size",
        "Llamas of 4 layers with random weights, 8 rows of 128 tokens, all trained.",
    ),
}

MODEL = f"""\
What a step of tunery costs beside the floating-point operations that it needs: for each computed token 4 per
number of the base's matrices (forward, and the gradient of the inputs) and 6 per number of the adapter, for
each predicting position 4 per number of the head, and 12 · heads · head width for each pair of tokens that
attend to each other, in each layer. "At the rate" is the time they would take at the matmul rate
measured beside the step; the share is that time over the measured one. Rank {plan.RANK} on all linear layers
unless said otherwise; the median of two steps after one to warm up.
"""


def scaling_section(results: Mapping[str, Any]) -> list[str]:
    """A table for each axis measured."""
    machine = results["machine"]
    where = f"{processor(machine)}, {machine['threads']} threads; {results['created']}, commit {results['commit']}.\n"
    parts = ["## Scaling\n", where, MODEL]
    for name, points in results["axes"].items():
        title, label, about = ABOUT[name]
        header = (
            label,
            "tokens",
            "computed",
            "GFLOP",
            "attention's part",
            "at the rate",
            "measured",
            "share",
            "tokens/s",
        )
        parts += [f"### {title}\n", f"{about}\n", table(header, [_row(point) for point in points]), ""]
    return parts


def _row(point: Mapping[str, Any]) -> list[str]:
    flops, seconds = point["flops"], point["seconds"]
    ideal = flops / point["matmul_rate"]
    at = point["at"]
    return [
        f"{at:,}" if isinstance(at, int) else at,
        f"{point['data_tokens']:,}",
        f"{point['computed_tokens']:,}",
        f"{flops / 1e9:,.0f}",
        f"{point['attention_flops'] / flops:.1%}",
        f"{ideal:.2f} s",
        f"{seconds:.2f} s",
        f"{ideal / seconds:.0%}",
        f"{point['data_tokens'] / seconds:,.0f}",
    ]
