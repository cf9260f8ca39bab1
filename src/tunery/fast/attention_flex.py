"""FlexAttention (Dong et al. 2024, arXiv:2412.05496) over whole blocks of a packed sequence, compiled once for all
lengths."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from tunery.fast.tree_mask import Tree, block_pattern, sees
from tunery.models.device import on_device

BLOCK = 128
"""Rows and columns of a block of the mask, FlexAttention's own default."""

SHORTEST = 2 * BLOCK
"""Shorter rows are padded to this inside FlexAttention: PyTorch compiles a graph of its own for sizes of 1."""

KernelOptions = Mapping[str, int | bool | str]
"""`kernel_options` of PyTorch's flex_attention, by name."""

KERNEL_OPTIONS: KernelOptions = {}
"""FlexAttention's `kernel_options` (block sizes, stages, warps), empty for PyTorch's own choice by GPU and head width.
To be changed only for what the GPU check's part `attention` measures to be faster, which calls `by_tree` with a
compiled `over_blocks` of other `options`. `{"bwd_num_stages": 2}` spills fewer registers in an H100's backward pass,
and overlaps less of its loading."""

GRAPHS = 64
"""Most graphs of FlexAttention in one process, two for each kind of attention; PyTorch would stop at eight."""


class Blocks(NamedTuple):
    """Which blocks of the mask are computed, first those with hidden pairs and then the full ones; each by queries, and
    by keys for the backward pass. Counts are int32 [1, 1, n], orders int32 [1, 1, n, n]: whose first `count` count.

    Attributes:
        window: int32 scalar. A tensor, so that layers with and without a window share a kernel.
    """

    window: Tensor
    partial: Tensor
    partial_order: Tensor
    partial_by_key: Tensor
    partial_by_key_order: Tensor
    full: Tensor
    full_order: Tensor
    full_by_key: Tensor
    full_by_key_order: Tensor


def make_blocks(tree: Tree, window: int | None, device: torch.device) -> Blocks:
    """The pattern of a tree of n · BLOCK tokens, on the device."""
    parts = [on_device(np.asarray(len(tree.enter) if window is None else window, np.int32), device)]
    for blocks in block_pattern(tree, window, BLOCK):
        for rows in (blocks, blocks.T):
            counts = rows.sum(axis=1, dtype=np.int32)
            order = np.argsort(~rows, axis=1, kind="stable").astype(np.int32)
            parts += [
                vary(on_device(counts[None, None], device), 2),
                vary(on_device(order[None, None], device), 2, 3),
            ]
    return Blocks(*parts)


def vary(tensor: Tensor, *dims: int) -> Tensor:
    """The tensor, after telling the compiler that these sizes differ from batch to batch: it compiles one kernel for
    all of them."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def block_mask(tree: Sequence[Tensor], blocks: Blocks) -> BlockMask:
    """FlexAttention's mask: tunery.fast.tree_mask's formula for pairs, and the pattern of blocks.

    Args:
        tree: `enter`, `end` and `position`, int32 [n, BLOCK].
    """
    length = BLOCK * tree[0].shape[0]
    enter, end, position = (x.flatten() for x in tree)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees((enter[query], position[query]), (enter[key], end[key], position[key]), blocks.window)

    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=blocks.partial,
        kv_indices=blocks.partial_order,
        full_kv_num_blocks=blocks.full,
        full_kv_indices=blocks.full_order,
        q_num_blocks=blocks.partial_by_key,
        q_indices=blocks.partial_by_key_order,
        full_q_num_blocks=blocks.full_by_key,
        full_q_indices=blocks.full_by_key_order,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=mask,
    )


def over_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Sequence[Tensor],
    blocks: Blocks,
    cap: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    options: KernelOptions = KERNEL_OPTIONS,
) -> Tensor:
    """FlexAttention over whole blocks: q [n, BLOCK, H, D], k [n, BLOCK, G, D], v [n, BLOCK, G, E] → [n·BLOCK, H, E].

    This is what is compiled. The mask is put together in here and the length follows from n, so that it is BLOCK · n to
    the compiler too, for any n: no length is a constant, and no kernel checks where the row ends.

    A sink takes part in the softmax and adds nothing: softmax over [scores, sink] is the plain softmax times
    sigmoid(logsumexp(scores) - sink), so it is put on afterwards.

    Args:
        cap: Gemma 2's soft cap. A tensor: the compiler refuses numbers that differ between models.
        options: FlexAttention's `kernel_options`.
    """
    q, k, v = (x.flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))

    def cap_score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert cap is not None
        return cap * torch.tanh(score / cap)

    out, aux = flex_attention(
        q,
        k,
        v,
        score_mod=None if cap is None else cap_score,
        block_mask=block_mask(tree, blocks),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=dict(options) or None,  # type: ignore[arg-type]
        return_aux=AuxRequest(lse=sinks is not None),
    )
    out = out.squeeze(0)
    if sinks is not None:
        weight = torch.sigmoid(aux.lse.squeeze(0) - sinks.to(aux.lse.dtype)[:, None])
        out = out * weight[..., None].to(out.dtype)
    return out.transpose(0, 1)


OverBlocks = Callable[..., Tensor]
"""`over_blocks`, or it compiled, or with other options."""


@functools.cache
def _compiled() -> OverBlocks:
    """`over_blocks` as one kernel; without the compiler it would build all T x T scores of every head."""
    return torch.compile(over_blocks, fullgraph=True)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Sequence[Tensor],
    blocks: Blocks,
    cap: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    compute: OverBlocks | None = None,
) -> Tensor:
    """FlexAttention over a row of any length: q [H, T, D], k [G, T, D], v [G, T, E] → [H, T, E].

    Args:
        tree: `enter`, `end` and `position`, int32 [n, BLOCK] with n · BLOCK tokens, at least T.
        compute: `over_blocks` as it is to be called; compiled, if left out.
    """
    compute = compute or _compiled()
    length, whole = q.shape[1], BLOCK * tree[0].shape[0]
    inputs = [_as_blocks(x, whole) for x in (q, k, v)]
    known = (
        compute,
        q.dtype,
        q.device,
        *(x.shape[2:] for x in inputs),
        scale,
        cap is None,
        sinks is None,
        torch.is_grad_enabled(),
        *(x.requires_grad for x in inputs),
    )
    with contextlib.nullcontext() if known in _compiled_for else _may_compile():
        out = compute(*inputs, tree, blocks, cap, sinks, scale)
    _compiled_for.add(known)
    out = out if whole == length else out[:length]  # a slice of everything would be copied in the backward pass
    return out.transpose(0, 1)


def _as_blocks(x: Tensor, length: int) -> Tensor:
    """[H, T, D] → [n, BLOCK, H, D], contiguous: a model's own tensors lie so already, and are copied only to be padded.
    One layout for all, since each would be compiled for."""
    x = x.transpose(0, 1)
    if length > x.shape[0]:
        x = F.pad(x, (0, 0, 0, 0, 0, length - x.shape[0]))
    return vary(x.contiguous().view(-1, BLOCK, *x.shape[1:]), 0)


def _may_compile() -> contextlib.AbstractContextManager[None]:
    """For the calls in which PyTorch may compile: entering this takes 0.1 ms, and there are as many calls as layers.

    A scale is a constant of the kernel, as it is in FlexAttention's own code: PyTorch would make a variable of it when
    it differs between two models."""
    return torch._dynamo.config.patch(recompile_limit=GRAPHS, specialize_float=True)


_compiled_for: set[tuple[object, ...]] = set()
"""Calls of which one like them came before: nothing is compiled for them any more."""


def forget() -> None:
    """As in a new process: nothing is compiled."""
    _compiled_for.clear()
