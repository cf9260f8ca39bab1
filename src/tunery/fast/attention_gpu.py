"""Attention over one packed sequence on a GPU, in one kernel for all segments.

Where no prefix is shared, variable-length flash attention (Dao 2023, arXiv:2307.08691) through
torch.nn.attention.varlen, or cuDNN's attention where all segments have one length and it was measured to be faster.
Otherwise, and for soft caps and sinks, FlexAttention (Dong et al. 2024, arXiv:2412.05496) with a block mask made from
the prefix tree. What is needed for all layers is made once a batch.

A kernel is used for those kinds of attention only for which it was tried (tunery.fast.attention_trials).

FlexAttention's gradients are the same numbers at every run. Those of flash attention and of cuDNN are not: they add up
∂L/∂q in the order in which the GPU's blocks finish, unless torch.use_deterministic_algorithms(True) is set, which is
slower (aten/src/ATen/native/transformers/cuda/attention_backward.cu).
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from tunery.data.batching import Group
from tunery.fast import attention_flex
from tunery.fast.attention_flex import BLOCK, SHORTEST, Blocks, OverBlocks, flex, make_blocks, vary
from tunery.fast.attention_rule import Rule
from tunery.fast.tree_mask import Tree, tree_of
from tunery.models.device import on_device

EQUAL_LENGTHS_BACKEND = SDPBackend.CUDNN_ATTENTION

WORTH_A_PLAN = 10
"""Batches of one shape (segments, length) from which cuDNN's attention is used. It plans anew for each shape. An
estimate: a few tenths of a second of planning, and 20 ms saved in a batch of 8,000 tokens of an 8B model."""

FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AttentionCase(NamedTuple):
    """What decides whether a kernel can compute a layer's attention: everything about it but the row's tokens."""

    dtype: torch.dtype
    device: torch.device
    heads: int
    kv_heads: int
    width: int
    value_width: int
    scale: float
    windowed: bool
    softcap: float | None
    sinks: bool


def kind_of(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> AttentionCase:
    """The kind of attention of q [H, T, D], k [G, T, D] and v [G, T, E]."""
    return AttentionCase(
        q.dtype,
        q.device,
        q.shape[0],
        k.shape[0],
        q.shape[-1],
        v.shape[-1],
        rule.scale,
        rule.window is not None,
        rule.softcap,
        rule.sinks is not None,
    )


_seen: Counter[tuple[int, int]] = Counter()
"""Batches of so many segments of one length (segments, length) in this process."""


class GpuLayout:
    """A packed sequence's metadata on the GPU, each part made when a layer first asks for it.

    Args:
        groups: of the batch (tunery.data.batching.PackedBatch.groups).

    Attributes:
        shared: whether any segment has ancestors.
        planned: whether the segments have one length, and such a batch came often enough to plan for (WORTH_A_PLAN).
        chosen: the kernel of each kind of attention and window, so that a layer that is recomputed meets it again.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device):
        self.groups, self.device = groups, device
        self.shared = any(len(group.path) for group in groups)
        self.chosen: dict[tuple[AttentionCase, int | None], Kernel | None] = {}
        self.planned = False
        if self.one_length is not None:
            shape = len(self.lengths), self.one_length
            _seen[shape] += 1
            self.planned = _seen[shape] > WORTH_A_PLAN
        self._blocks: dict[int | None, Blocks] = {}
        self._numbers: dict[float, Tensor] = {}

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each segment where none shares a prefix. int64 [rows]."""
        return np.concatenate([np.asarray(group.lengths) for group in self.groups])

    @functools.cached_property
    def one_length(self) -> int | None:
        """The length of all segments; None where they differ or share prefixes."""
        first = int(self.lengths[0])
        return first if not self.shared and bool((self.lengths == first).all()) else None

    @functools.cached_property
    def edges(self) -> Tensor:
        """Where each segment starts, and the end: int32 [rows + 1]."""
        return on_device(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32), self.device)

    @functools.cached_property
    def tree(self) -> Tree:
        """Of the tokens, padded to n blocks, at least SHORTEST."""
        tree = tree_of(self.groups)
        return tree.padded(max(SHORTEST, -(-len(tree.enter) // BLOCK) * BLOCK))

    @functools.cached_property
    def tree_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """`enter`, `end` and `position` of the tree, int32 [n, BLOCK]."""
        each = (on_device(x, self.device) for x in (self.tree.enter, self.tree.end, self.tree.position))
        return tuple(vary(x.view(-1, BLOCK), 0) for x in each)  # type: ignore[return-value]

    @functools.cached_property
    def _longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.tree.position.max()) + 1

    def number(self, value: float) -> Tensor:
        """A float32 scalar on the device."""
        if value not in self._numbers:
            self._numbers[value] = on_device(np.asarray(value, np.float32), self.device)
        return self._numbers[value]

    def blocks(self, window: int | None) -> Blocks:
        """The pattern of blocks for FlexAttention, one for each sliding window among the layers."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._blocks:
            self._blocks[window] = make_blocks(self.tree, window, self.device)
        return self._blocks[window]


# --------------------------------------------------------------------------- kernels


def by_tree(
    q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule, compute: OverBlocks | None = None
) -> Tensor:
    """Attention of all segments through FlexAttention. q [H, T, D], k [G, T, D], v [G, T, E] → [H, T, E].

    Args:
        compute: see tunery.fast.attention_flex.flex.
    """
    cap = None if rule.softcap is None else layout.number(rule.softcap)
    return flex(q, k, v, layout.tree_tensors, layout.blocks(rule.window), cap, rule.sinks, rule.scale, compute)


def by_lengths(q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule) -> Tensor:
    """Attention of separate segments through variable-length flash attention; shapes as `by_tree`."""
    longest = int(layout.lengths.max())
    # Flash attention counts the tokens left of the query; (-1, 0) is its plain causal mask.
    left = -1 if rule.window is None or rule.window >= longest else rule.window - 1
    compute = partial(varlen_attn, enable_gqa=q.shape[0] != k.shape[0]) if _FLASH_ASKS_FOR_GROUPS else varlen_attn
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = compute(q, k, v, layout.edges, layout.edges, longest, longest, scale=rule.scale, window_size=(left, 0))
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)


_FLASH_ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""PyTorch 2.11 takes fewer key heads than query heads without being told."""


def by_equal_lengths(q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule) -> Tensor:
    """Attention of separate segments of one length, as a batch, through cuDNN's attention; shapes as `by_tree`."""
    assert layout.one_length is not None
    q, k, v = (x.transpose(0, 1).unflatten(0, (-1, layout.one_length)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(EQUAL_LENGTHS_BACKEND):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2).flatten(0, 1).transpose(0, 1)


# --------------------------------------------------------------------------- which one


Kernel = Callable[[Tensor, Tensor, Tensor, GpuLayout, Rule], Tensor]

NAMES: dict[Kernel, str] = {
    by_equal_lengths: "cuDNN attention",
    by_lengths: "flash attention",
    by_tree: "FlexAttention",
}


def kernels_for(kind: AttentionCase) -> list[Kernel]:
    """What might compute this kind of attention, the fastest first. Nothing for float64, and for heads under 16 numbers
    wide."""
    flash = (
        kind.softcap is None
        and not kind.sinks
        and kind.dtype in FLASH_DTYPES
        and kind.width == kind.value_width <= 256
        and kind.width % 8 == 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(kind.device) >= (8, 0)
    )
    found: list[Kernel] = [by_equal_lengths, by_lengths] if flash else []
    if kind.dtype in FLEX_DTYPES and min(kind.width, kind.value_width) >= 16:
        found.append(by_tree)
    return found


def fits(kernel: Kernel, layout: GpuLayout, window: int | None) -> bool:
    """Whether a kernel can compute these segments."""
    if kernel is by_tree:
        return True
    if kernel is by_lengths:
        return not layout.shared
    length = layout.one_length
    return length is not None and (window is None or window >= length)


_tried: dict[tuple[object, ...], str | None] = {}
"""By (kernel, *kind): None if the kernel is used for such attention, else why not."""

_untried: dict[AttentionCase, int | None] = {}
"""Kinds of attention that came before any kernel was tried for them, with their windows."""


def forget() -> None:
    """As in a new process: nothing was tried or compiled."""
    for kept in (_tried, _untried, _seen):
        kept.clear()
    attention_flex.forget()


def refusals() -> list[str]:
    """Kernels that were tried in this process and are not used, with the reason, each as a sentence. Not of those that
    another kernel stands in for as well."""
    return list(dict.fromkeys(why for (kernel, *_), why in _tried.items() if why and kernel is not by_equal_lengths))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule) -> Tensor | None:
    """Attention of all segments: q [H, T, D], k [G, T, D], v [G, T, E] → [H, T, E].

    Returns:
        None where the plain way has to be used. A kind of attention that comes for the first time is computed the plain
        way and noted, to be tried before the next batch.
    """
    kind = kind_of(q, k, v, rule)
    if (kind, rule.window) not in layout.chosen:
        layout.chosen[kind, rule.window] = _choose(kind, layout, rule.window)
    kernel = layout.chosen[kind, rule.window]
    return None if kernel is None else kernel(q, k, v, layout, rule)


def _choose(kind: AttentionCase, layout: GpuLayout, window: int | None) -> Kernel | None:
    for kernel in kernels_for(kind):
        if (kernel, *kind) not in _tried:
            _untried[kind] = window
        elif _tried[kernel, *kind] is None and fits(kernel, layout, window):
            if kernel is by_equal_lengths and not layout.planned:
                continue
            return kernel
    return None
