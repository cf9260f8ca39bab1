"""How many rows are computed at a time, and whether activations must be recomputed, from the memory at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunery.config import Task
from tunery.data.batching import Row, flatten, largest_unit, step_rows
from tunery.data.prepare import Prepared, Rows
from tunery.models.device import peak_memory, resident_memory
from tunery.models.flat import FlatModel
from tunery.models.memory import Lean, MemoryEstimate, estimate, logit_chunk, tokens_that_fit
from tunery.models.quantized import held_bytes, numel

SAMPLED_STEPS = 8
USED_SHARE = 0.8
"""Share of the available memory a run plans with; the rest is for what no formula knows."""


@dataclass(frozen=True)
class Sizing:
    """The micro-batch limit, whether to recompute activations, and the memory that is expected.

    Attributes:
        estimate: of the base, the adapter and a step.
        resident: what the process holds besides the base on a CPU: libraries, tokenizer, rows. 0 on a GPU.
        peak: the most it has held so far, while the base was loaded.
    """

    micro_rows: int
    micro_tokens: int | None
    gradient_checkpointing: bool
    estimate: MemoryEstimate
    resident: int
    peak: int

    @property
    def expected_bytes(self) -> int:
        """The peak that is expected, to compare with tunery.models.device.peak_memory."""
        return max(self.peak, self.estimate.total + self.resident)


def sample_batches(task: Task, train: Rows) -> Iterator[list[Row]]:
    """The batches of the first steps."""
    for step in range(SAMPLED_STEPS):
        yield step_rows(train.rows, train.unit, task.seed, step, task.train.batch_size)


def largest_batch(task: Task, train: Rows, *, share: bool = True) -> tuple[int, int]:
    """(computed tokens, predicting positions) of the largest among the first steps' batches, unsplit."""
    flat = [flatten(batch, share=share) for batch in sample_batches(task, train)]
    return max(len(b.ids) for b in flat), max(len(b.sources) for b in flat)


def kept_keys(rows: Sequence[Row], device: torch.device) -> int:
    """For how many keys attention keeps its weights until the backward pass: the longest row's; none on a GPU."""
    return max(len(row.inputs) for row in rows) if device.type == "cpu" else 0


def wanted_rows(task: Task) -> int:
    """Rows computed at a time, unless memory forbids: `train.micro_batch_size`, or the whole batch."""
    wanted = task.train.micro_batch_size
    return task.train.batch_size if wanted == "auto" else min(wanted, task.train.batch_size)


def size_up(
    task: Task, prepared: Prepared, base: Any, model: FlatModel, adapter: Mapping[str, Tensor], available: int
) -> Sizing:
    """Settle `micro_batch_size: auto` and `gradient_checkpointing: auto`.

    Args:
        base: the model, for its config and number format.
        available: bytes free now, the base already loaded.
    """
    rows = prepared.train.rows
    config = base.config.get_text_config()
    longest = largest_unit(rows, prepared.train.unit if model.flattened else 1)
    tokens, positions = largest_batch(task, prepared.train) if model.flattened else (longest, longest)
    micro_rows = wanted_rows(task)
    tokens = max(longest, -(-tokens * micro_rows // task.train.batch_size))
    common: dict[str, Any] = {
        "parameters": sum(numel(p) for p in base.parameters() if not p.requires_grad),
        "base_bytes": held_bytes(base, base.dtype.itemsize),
        "trainable": sum(tensor.numel() for tensor in adapter.values()),
        "dtype_bytes": base.dtype.itemsize,
        "keys": kept_keys(rows, base.device),
        "logit_chunk": logit_chunk(base.device.type),
        "lean": Lean.of(base),
    }

    def predict(tokens: int, recompute: bool) -> MemoryEstimate:
        return estimate(
            config, tokens_in_flight=tokens, trained_tokens=min(tokens, positions), gradient_checkpointing=recompute,
            **common,
        )  # fmt: skip

    asked = task.train.gradient_checkpointing
    recompute = asked is True
    resident = max(0, resident_memory(base.device) - predict(0, False).base)
    peak = peak_memory(base.device)
    budget = int(USED_SHARE * available) + predict(0, False).base  # the base is already there
    if predict(tokens, recompute).total <= budget:
        return Sizing(micro_rows, None, recompute, predict(tokens, recompute), resident, peak)
    room = tokens_that_fit(config, budget_bytes=budget, gradient_checkpointing=recompute, **common)
    if asked == "auto" and room < longest:
        recompute = True
        room = tokens_that_fit(config, budget_bytes=budget, gradient_checkpointing=True, **common)
    room = max(longest, room)
    return Sizing(micro_rows, room, recompute, predict(min(tokens, room), recompute), resident, peak)
