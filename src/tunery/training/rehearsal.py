"""How fast a task will train here: a few of its steps on the first layers of its model, with random weights, timed.

The matmul rate alone does not tell. Training reaches 45 to 86 % of it in float32, and 11 % on a processor with AMX,
where matmuls are so fast that all else rules (docs/lab.md); and a rate that was taken in a moment when another program
had the cores is wrong by any factor.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tunery.config import Task
from tunery.data.batching import PackedBatch, Row, pack, step_rows
from tunery.data.prepare import Prepared, Rows
from tunery.errors import TuneryError
from tunery.fast.last_layer import last_layer_parameters
from tunery.fast.packed_model import optimize_model
from tunery.lora.attach import adapter_names, trainable_parameters
from tunery.models.device import matmul_rate
from tunery.models.load import random_model
from tunery.models.quantized import stored_quantization
from tunery.models.typed import text_config
from tunery.models.windows import layer_windows, visible_pairs
from tunery.text import plural
from tunery.training.flops import step_flops
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import batch_gradient
from tunery.training.objectives.base import REFERENCE, Objective
from tunery.training.plan import make_objective
from tunery.training.start import attach_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LAYERS = 4
STEPS = 5
"""Timed, after one that warms up."""
SECONDS = 2.0
"""Fewer steps are timed where they last longer, but two at least."""
STEP_SECONDS = 0.5
"""A step of more is cut to fewer rows."""
MOST_WEIGHTS = 250_000_000
"""A larger model is not made for this: filling it would last longer than the steps."""

USUAL = 0.45
"""Fraction of the matmul rate that is counted on where nothing was timed (docs/lab.md)."""
FRACTIONS = (0.15, 0.8)
"""Fractions of the matmul rate between which it then lies."""
FASTER, SLOWER = 0.85, 1.3
"""How much less and more than the fastest and the slowest timed step training may take: all layers, another hour."""


@dataclass(frozen=True)
class TimeEstimate:
    """How long the steps of a training will take, in seconds.

    Attributes:
        likely: between `low` and `high`.
        basis: what it was told from, in words.
    """

    likely: float
    low: float
    high: float
    basis: str


def estimate_time(
    flops: float,
    task: Task,
    prepared: Prepared,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> TimeEstimate:
    """Of a training of so many floating-point operations: from timed steps where they can be had, that is on a CPU and
    with a plain base that is not large; else from the matmul rate alone."""
    rates = _timed_rates(task, prepared, config, dtype) if device.type == "cpu" else []
    if not rates:
        return rough_time(flops, dtype, device)
    shown = min(LAYERS, text_config(config).num_hidden_layers)
    return TimeEstimate(
        flops / statistics.median(rates),
        FASTER * flops / max(rates),
        SLOWER * flops / min(rates),
        f"{plural(len(rates), 'step')} of {plural(shown, 'layer')}, timed just now",
    )


def rough_time(flops: float, dtype: torch.dtype, device: torch.device) -> TimeEstimate:
    """As `estimate_time`, from the matmul rate alone."""
    rate, (least, most) = matmul_rate(device, dtype), FRACTIONS
    basis = f"{least:.0%} to {most:.0%} of the rate that matmuls reach here just now"
    return TimeEstimate(flops / (USUAL * rate), flops / (most * rate), flops / (least * rate), basis)


def _timed_rates(task: Task, prepared: Prepared, config: PreTrainedConfig, dtype: torch.dtype) -> list[float]:
    """Floating-point operations per second that each of some steps reaches; [] where none can be timed."""
    if task.train.quantize != "none" or stored_quantization(config):
        return []
    model = random_model(config, LAYERS, dtype, most=MOST_WEIGHTS)
    if model is None:
        return []
    fresh = task.model_copy(update={"lora": task.lora.model_copy(update={"start": None})})
    try:
        clock = attach_adapter(fresh, model).clock
    except TuneryError:  # the targets are layers further up
        return []
    packed, parameters = optimize_model(model), trainable_parameters(model)
    objective = make_objective(fresh, prepared.data.kind, prepared.train)
    rows = _short_batch(task, prepared.train, model, objective)
    flops = mean_flops(model, [pack(rows)], objective)
    limit = MicroBatchLimit(len(rows))

    def step() -> None:
        batch_gradient(packed, parameters, rows, limit, clock, (task.seed, 0), None, objective).read()

    seconds: list[float] = []
    with packed.running():
        while len(seconds) <= STEPS and (len(seconds) < 3 or sum(seconds) < SECONDS):
            seconds.append(_seconds_of(step))
    return [flops / taken for taken in seconds[1:]]


def _seconds_of(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _short_batch(task: Task, train: Rows, model: PreTrainedModel, objective: Objective) -> list[Row]:
    """The rows of the first step, or as many of them as take about STEP_SECONDS."""
    rows = list(step_rows(train.rows, train.unit, task.seed, 0, task.train.batch_size))
    rate = USUAL * matmul_rate(torch.device("cpu"), model.dtype)
    fits = STEP_SECONDS * rate / mean_flops(model, [pack(rows)], objective)
    units = max(1, min(1.0, fits) * len(rows) // train.unit)
    return rows[: int(units) * train.unit]


def mean_flops(model: PreTrainedModel, batches: Sequence[PackedBatch], objective: Objective) -> float:
    """Operations of an optimizer step, from some of them.

    Args:
        model: with the adapter that is to be trained; its weights may be on PyTorch's "meta" device.
    """
    windows = Counter(layer_windows(model.config))
    trainable = sum(tensor.numel() for tensor in trainable_parameters(model))
    whole = step_flops(
        model,
        computed_tokens=sum(len(batch.ids) for batch in batches),
        positions=sum(len(batch.sources) for batch in batches),
        adapter_parameters=trainable,
        passes=objective.passes,
        pairs=sum(visible_pairs(windows, batch) for batch in batches),
        last_layer=last_layer_parameters(model),
        reference_parameters=trainable if REFERENCE in adapter_names(model) else 0,
    )
    return whole / len(batches)
