"""Llama shapes with random weights on the device, tunery's step over them, and the measurement of steps."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_check.check import Check, Shape, gigabytes, milliseconds
from bench.peers.common import Workload
from bench.peers.with_tunery import Trainer
from tunery.data.batching import Row, flatten
from tunery.fast import attention_gpu
from tunery.fast import compile as fast_compile
from tunery.training.layers import running_layers
from tunery.training.loop import StepResult

RATE = (8192, 8192, 8192)
"""The product whose rate a step's share refers to."""


def llama_config(shape: Shape) -> Any:
    """transformers' configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    given: dict[str, Any] = dict(shape)
    return LlamaConfig(**given, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})


def random_llama(check: Check, shape: Shape) -> Any:
    """A Llama in bfloat16 with random weights, made on the device: nothing is written or read."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(check.device):
            return LlamaForCausalLM(llama_config(shape))
    finally:
        torch.set_default_dtype(before)


def trainer_of(model: Any) -> Trainer:
    """tunery's step with rank 16 on all linear layers, as bench.gpu measures it."""
    work = Workload(
        folder=Path(), name="gpu-check", kind="rows", base="", adapter="", precision="bfloat16", batch_size=1, rank=16,
        alpha=32.0, learning_rate=2e-4, max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    return Trainer(work, model.requires_grad_(False).eval())


def random_rows(
    check: Check, count: int, shared: int = 0, seed: int = 0, length: int | None = None, trained: int | None = None
) -> list[Row]:
    """Rows of random tokens.

    Args:
        shared: so many tokens in front are the same in all rows, and not trained.
        length: tokens of a row; None for the check's.
        trained: only so many tokens at the end are trained; None for all that are not shared.
    """
    length = length or check.length
    rng = np.random.default_rng(seed)
    stem = rng.integers(0, check.vocabulary, shared)
    weights = np.zeros(length, np.float32)
    weights[max(1, shared if trained is None else length - trained) :] = 1
    own = [rng.integers(0, check.vocabulary, length - shared) for _ in range(count)]
    return [Row(np.concatenate([stem, ids]).astype(np.int32), weights) for ids in own]


def fresh_rows(check: Check, count: int, shared: int = 0) -> Callable[[int], list[Row]]:
    """Step → other random rows, for `measure_steps`."""
    return lambda step: random_rows(check, count, shared, seed=step)


def measure_steps(
    check: Check, part: str, trainer: Trainer, batch: Callable[[int], Sequence[Row]], steps: int, **more: object
) -> None:
    """Time optimizer steps after two to warm up, and say: median, tokens/s, share of the rate of products, peak memory.

    Args:
        batch: the rows of a step, by its number.
        more: further facts for the line.
    """
    took: list[float] = []
    result: StepResult | None = None
    for number in range(steps + 2):
        rows = batch(number)
        check.wait()
        if number == 2 and check.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = trainer.step(number, rows)
        check.wait()
        took.append(time.perf_counter() - started)
    assert result is not None
    seconds, rate = statistics.median(took[2:]), check.product_rate(*RATE)
    flops = trainer.flops(result.sums)
    on_gpu = check.device.type == "cuda"
    check.say(
        part,
        rows=len(batch(0)),
        data_tokens_s=round(result.sums.data_tokens / seconds),
        computed_tokens_s=round(result.sums.computed_tokens / seconds),
        ms=milliseconds(seconds),
        all_ms=[milliseconds(each) for each in took],
        share=round(flops / seconds / rate, 3),
        tflops=round(flops / seconds / 1e12, 4),
        rate=round(rate / 1e12, 4),
        loss=result.loss,
        norm=result.gradient_norm,
        peak_GB=gigabytes(check.peak_bytes()),
        held_GB=gigabytes(torch.cuda.memory_allocated()) if on_gpu else None,
        refusals=[*attention_gpu.refusals(), *fast_compile.refusals()],
        **more,
    )


def measure_recomputing(check: Check, part: str, trainer: Trainer, count: int, steps: int) -> None:
    """The same with activations recomputed in the backward pass."""
    with running_layers(trainer.model.model, recompute=True):
        measure_steps(check, part, trainer, fresh_rows(check, count), steps)


def measure_host(check: Check, trainer: Trainer, rows: Sequence[Row], shape: str) -> None:
    """How long the host takes to give a step to the device: launches bound the step where this is near the whole."""
    from tunery.training.loss import batch_loss

    for last in (False, False, True):  # the first two warm up
        check.wait()
        at = [time.perf_counter()]
        batch = flatten(rows)
        at.append(time.perf_counter())
        with trainer.model.running():
            at.append(time.perf_counter())
            loss = batch_loss(trainer.model, batch).total / 1e4
            at.append(time.perf_counter())
            loss.backward()
            at.append(time.perf_counter())
            check.wait()
            at.append(time.perf_counter())
        for parameter in trainer.adapter.values():
            parameter.grad = None
        if last:
            flatten_, enter, forward, backward, waiting = (milliseconds(b - a) for a, b in itertools.pairwise(at))
            check.say(
                "host", shape=shape, rows=len(rows), flatten_ms=flatten_, enter_ms=enter, forward_ms=forward,
                backward_ms=backward, then_waiting_ms=waiting,
            )  # fmt: skip
