"""The ways to compute attention of four rows, forward and with the backward pass; FLOP/s of the pairs that see each
other."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_check.check import Check, milliseconds
from bench.gpu_check.trainer import random_rows
from tunery.data.batching import PackedBatch, flatten
from tunery.fast import attention_gpu
from tunery.fast.attention_flex import over_blocks

ROWS = 4
HEADS = ((32, 8, 128), (32, 8, 64), (16, 8, 256))
"""Query heads, key heads, width: of Llama 3, of smaller models, of Gemma."""

FLEX_OPTIONS: Mapping[str, dict[str, Any]] = {
    "flex, backward in 2 stages": {"bwd_num_stages": 2},
    "flex, prescaled, safe rows": {"PRESCALE_QK": True, "ROWS_GUARANTEED_SAFE": True},
    "flex, backward 32x128": {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32},
}
"""FlexAttention's kernel options, tried beside PyTorch's own choice."""

Way = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """Rows, their layout, and random q [H, T, D], k and v [G, T, D]."""

    check: Check
    batch: PackedBatch
    layout: attention_gpu.GpuLayout
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, check: Check, heads: int, keys: int, width: int, shared: int) -> Case:
        """Four random rows that share so many tokens in front."""
        batch = flatten(random_rows(check, ROWS, shared))

        def noise(count: int) -> Tensor:  # by token first, as models give them
            made = check.noise(len(batch.ids), count, width).transpose(0, 1)
            return made.requires_grad_(not check.tiny)  # FlexAttention has no backward pass on a CPU

        return cls(
            check, batch, attention_gpu.GpuLayout(batch.groups, check.device), noise(heads), noise(keys), noise(keys)
        )

    @property
    def rule(self) -> attention_gpu.Rule:
        """Causal, without a window."""
        return attention_gpu.Rule(self.q.shape[-1] ** -0.5)

    def flex(self, options: dict[str, Any] | None = None) -> Way:
        """FlexAttention over the prefix tree, as tunery calls it."""
        made: Any = over_blocks if self.check.tiny else torch.compile(over_blocks, fullgraph=True)
        call = made if options is None else functools.partial(made, options=options)
        return lambda: attention_gpu.by_tree(self.q, self.k, self.v, self.layout, self.rule, call)

    def lengths(self) -> Tensor:
        """Flash attention over separate rows of any length, as tunery calls it."""
        return attention_gpu.by_lengths(self.q, self.k, self.v, self.layout, self.rule)

    def equal_lengths(self) -> Tensor:
        """Rows of one length as a batch through cuDNN, as tunery calls it."""
        return attention_gpu.by_equal_lengths(self.q, self.k, self.v, self.layout, self.rule)

    def dense(self, backend: SDPBackend) -> Tensor:
        """Rows of one length as a batch, through a backend of scaled_dot_product_attention; [H, T, D]."""
        q, k, v = (x.unflatten(1, (ROWS, -1)).transpose(0, 1) for x in (self.q, self.k, self.v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(0, 1).flatten(1, 2)

    def ways(self, shared: int) -> dict[str, Way]:
        """What can compute these rows, by name."""
        found: dict[str, Way] = {"flex": self.flex()}
        if shared:
            if self.q.shape[-1] == 128:
                found |= {name: self.flex(options) for name, options in FLEX_OPTIONS.items()}
            return found
        if self.check.tiny:  # what only a GPU has is left out
            return found | {"sdpa math": lambda: self.dense(SDPBackend.MATH)}
        return found | {
            "varlen": self.lengths,
            "sdpa cudnn": self.equal_lengths,
            "sdpa flash": lambda: self.dense(SDPBackend.FLASH_ATTENTION),
        }


def attention(check: Check) -> None:
    """FlexAttention everywhere; where nothing is shared, variable-length flash attention and batches through cuDNN."""
    for heads in ((4, 2, 16),) if check.tiny else HEADS:
        for shared in (0, check.length // 2) if heads[-1] in (16, 128) else (check.length // 2,):
            case = Case.of(check, *heads, shared)
            for name, way in case.ways(shared).items():
                part = f"attention, {name}, {heads}, {shared} shared"
                check.attempt(part, functools.partial(_measure, case, name, way, shared))


def _measure(case: Case, name: str, way: Way, shared: int) -> None:
    check, leaves = case.check, (case.q, case.k, case.v)
    slope = check.noise(*case.q.transpose(0, 1).shape).transpose(0, 1)

    def both() -> None:
        out = way()
        if not check.tiny:
            torch.autograd.grad(out, leaves, slope)

    torch.compiler.reset()
    started = time.perf_counter()
    both()
    first = check.since(started)
    forward, whole = check.timed(way), check.timed(both)
    heads, _, width = case.q.shape
    flops = 4.0 * case.batch.visible_pairs() * heads * width
    facts: dict[str, object] = {"first_s": first, "forward_ms": milliseconds(forward, 3)}
    if not check.tiny:
        backward = max(whole - forward, 1e-9)
        facts |= {"both_ms": milliseconds(whole, 3), "backward_tflops": round(2.5 * flops / backward / 1e12)}
    check.say(
        "attention",
        way=name,
        heads=[heads, case.k.shape[0], width],
        shared=shared,
        forward_tflops=round(flops / forward / 1e12, 4),
        **facts,
    )
