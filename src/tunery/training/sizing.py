"""How many rows are computed at a time, and whether activations must be recomputed, from the memory at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tunery.config import Task
from tunery.data.batching import PackedBatch, Row, largest_unit, pack, step_rows
from tunery.data.prepare import Prepared, Rows
from tunery.fast.packed_model import PackedModel
from tunery.lora.attach import base_parameters
from tunery.models.device import peak_memory, resident_memory
from tunery.models.quantized import held_bytes, numel
from tunery.models.typed import text_config
from tunery.training.memory import Lean, MemoryEstimate, StepSizes, estimate, logit_chunk, tokens_that_fit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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


@dataclass(frozen=True)
class Need:
    """What the steps of a task need of memory, for any number of tokens at a time.

    Attributes:
        config: of the model.
        tokens: computed at a time, unless memory forbids.
        longest: computed tokens of the largest row (or pair): the least that must fit.
        positions: most predicting positions.
        sizes: without activations recomputed.
    """

    config: PreTrainedConfig
    tokens: int
    longest: int
    positions: int
    sizes: StepSizes

    @classmethod
    def of(
        cls,
        task: Task,
        train: Rows,
        model: PreTrainedModel,
        *,
        base_bytes: int,
        dtype_bytes: int,
        device: torch.device,
        flattened: bool = True,
    ) -> Need:
        """Of a task.

        Args:
            model: with the adapter that is to be trained; its weights may be on PyTorch's "meta" device.
            base_bytes: of the frozen weights.
            dtype_bytes: of a number of the base.
            device: where the model runs.
            flattened: rows run as one packed sequence, not one by one.
        """
        longest = largest_unit(train.rows, train.unit if flattened else 1)
        tokens, positions = largest(sampled(task, train)) if flattened else (longest, longest)
        sizes: StepSizes = {
            "parameters": sum(numel(p) for p in base_parameters(model)),
            "base_bytes": base_bytes,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "dtype_bytes": dtype_bytes,
            "gradient_checkpointing": False,
            "keys": _kept_keys(train.rows, device),
            "logit_chunk": logit_chunk(device.type),
            "lean": Lean.of(model),
        }
        at_once = max(longest, -(-tokens * wanted_rows(task) // task.train.batch_size))
        return cls(text_config(model.config), at_once, longest, positions, sizes)

    def estimate(self, tokens: int, recompute: bool) -> MemoryEstimate:
        """With so many tokens at a time, activations recomputed or not."""
        trained, sizes = min(tokens, self.positions), self._sizes(recompute)
        return estimate(self.config, tokens_in_flight=tokens, trained_tokens=trained, **sizes)

    def tokens_within(self, budget: int, recompute: bool) -> int:
        """How many tokens at a time keep to so many bytes."""
        return tokens_that_fit(self.config, budget_bytes=budget, **self._sizes(recompute))

    def _sizes(self, recompute: bool) -> StepSizes:
        return {**self.sizes, "gradient_checkpointing": recompute}


def sampled(task: Task, train: Rows, *, share: bool = True) -> list[PackedBatch]:
    """The batches of the first steps, each as one packed sequence."""
    steps = (step_rows(train.rows, train.unit, task.seed, step, task.train.batch_size) for step in range(SAMPLED_STEPS))
    return [pack(rows, share=share) for rows in steps]


def largest(batches: Sequence[PackedBatch]) -> tuple[int, int]:
    """(computed tokens, predicting positions): the most that any of them has."""
    return max(len(batch.ids) for batch in batches), max(len(batch.sources) for batch in batches)


def _kept_keys(rows: Sequence[Row], device: torch.device) -> int:
    """For how many keys attention keeps its weights until the backward pass: the longest row's; none on a GPU."""
    return max(len(row.inputs) for row in rows) if device.type == "cpu" else 0


def wanted_rows(task: Task) -> int:
    """Rows computed at a time, unless memory forbids: `train.micro_batch_size`, or the whole batch."""
    wanted = task.train.micro_batch_size
    return task.train.batch_size if wanted == "auto" else min(wanted, task.train.batch_size)


def size_up(task: Task, prepared: Prepared, base: PreTrainedModel, model: PackedModel, available: int) -> Sizing:
    """Settle `micro_batch_size: auto` and `gradient_checkpointing: auto`.

    Args:
        base: the model with the adapter that is to be trained.
        available: bytes free now, the base already loaded.
    """
    dtype_bytes, micro_rows = base.dtype.itemsize, wanted_rows(task)
    need = Need.of(
        task,
        prepared.train,
        base,
        base_bytes=held_bytes(base, dtype_bytes),
        dtype_bytes=dtype_bytes,
        device=base.device,
        flattened=model.flattened,
    )
    held = need.estimate(0, False).base
    asked = task.train.gradient_checkpointing
    recompute = asked is True
    resident = max(0, resident_memory(base.device) - held)
    peak = peak_memory(base.device)
    budget = int(USED_SHARE * available) + held  # the base is already there
    if need.estimate(need.tokens, recompute).total <= budget:
        return Sizing(micro_rows, None, recompute, need.estimate(need.tokens, recompute), resident, peak)
    room = need.tokens_within(budget, recompute)
    if asked == "auto" and room < need.longest:
        recompute = True
        room = need.tokens_within(budget, True)
    room = max(need.longest, room)
    return Sizing(micro_rows, room, recompute, need.estimate(min(need.tokens, room), recompute), resident, peak)
