"""Attention over one packed sequence, segment by segment, through transformers' public attention interface.

A packed sequence holds the nodes of a prefix tree (tunery.data.batching). A node's tokens attend to all tokens of the
node's ancestors and causally to themselves; no row ever sees another. Nodes with one parent are computed together, in
blocks: batched products of queries with keys, softmax, batched products with values, and the same by hand backwards,
so that neither masks, float32 scores nor copies of them are kept. Grouped-query heads (a group's query heads are folded
into the rows of one product), sliding windows, soft caps (Gemma 2) and attention sinks (gpt-oss) are honoured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunery.data.batching import Group
from tunery.fast.attention_gpu import GpuLayout, attend
from tunery.fast.attention_rule import (
    Rule,
    additive_mask,
    attention_function,
    attention_weights,
    capped,
    in_reach,
)
from tunery.fast.attention_trials import try_kernels, try_postponed_again
from tunery.models.autograd import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "tunery_flat"

KERNEL_DEVICES = ("cuda",)
"""Types of devices with kernels of their own (tunery.fast.attention_gpu)."""

KEPT_KEYS = 640
"""Up to this many keys the attention weights are kept for the backward pass; beyond, they are computed again."""

BLOCK_QUERIES = 256
"""Queries of one node that are computed together; what a block's last query does not see is not computed."""

BLOCK_SCORES = 1 << 22
"""Most attention scores that are computed together, unless one node's alone are more."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries of every node of a chunk, and the keys [ancestors; own] that they may see.

    Attributes:
        queries: int64, rows of q seen as [T · G, H/G · D], by node, key head and query.
        keys: which of the chunk's P + Q keys.
        mask: [1, Q' · H/G, keys], 0 where a query sees a key, else -inf.
        padding: int64, rows of `queries` that stand for no token; None where there are none.
    """

    queries: Tensor
    keys: slice
    mask: Tensor
    padding: Tensor | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Nodes with one parent whose attention is computed together, n of them, padded to Q own tokens.

    Attributes:
        keys: int64 [n · G · (P + Q)], rows of k and v seen as [T · G, D].
        batch: n · G.
        shared: P, the number of ancestors' tokens.
        path: the ancestors' tokens: a slice where they stand side by side; None where there are none.
    """

    keys: Tensor
    batch: int
    shared: int
    path: Tensor | slice | None
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How one kind of attention (heads, window) is computed over one packed sequence.

    Attributes:
        chunks: parents before children.
        from_queries: int64 [T · G], where each (token, key head) stands in the blocks' queries, one after another.
        from_keys: int64 [T · G], where it stands in the chunks' keys.
    """

    chunks: tuple[Chunk, ...]
    from_queries: Tensor
    from_keys: Tensor


def _places(group: Group, nodes: slice, kv_heads: int) -> np.ndarray:
    """Rows [n, G, Q] of the group's own tokens; -1 where a node is shorter."""
    lengths = np.asarray(group.lengths)
    starts = group.start + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    inside = np.arange(lengths.max())
    tokens = starts[nodes, None] + inside
    rows = tokens[:, None, :] * kv_heads + np.arange(kv_heads)[None, :, None]
    return np.where((inside < lengths[nodes, None])[:, None, :], rows, -1)


def _path_rows(group: Group, nodes: int, kv_heads: int) -> np.ndarray:
    """Rows [n, G, P] of the ancestors' tokens."""
    rows = group.path[None, :] * kv_heads + np.arange(kv_heads)[:, None]
    return np.broadcast_to(rows, (nodes, *rows.shape))


def _as_path(group: Group, device: torch.device) -> Tensor | slice | None:
    if not len(group.path):
        return None
    first, last = int(group.path[0]), int(group.path[-1])
    together = last - first + 1 == len(group.path)
    return slice(first, last + 1) if together else torch.from_numpy(group.path).to(device)


class PackedLayout:
    """The attention pattern of one packed sequence; given to the model as the keyword argument `segments`.

    Where there are kernels for the device, those are tried here that layers of the batch before asked for first.

    Args:
        kernels: whether to use them.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device, kernels: bool = True):
        self.groups, self.device = tuple(groups), device
        self.gpu = None
        if kernels and device.type in KERNEL_DEVICES:
            try_kernels(_plainly)
            self.gpu = GpuLayout(groups, device)
        self._plans: dict[tuple[int, int, int | None, torch.dtype], AttentionPlan] = {}

    def plan(self, heads: int, kv_heads: int, window: int | None, dtype: torch.dtype) -> AttentionPlan:
        """Made for the first layer that asks, and kept for the others."""
        longest = max(len(group.path) + max(group.lengths) for group in self.groups)
        window = window if window is not None and window < longest else None
        name = (heads, kv_heads, window, dtype)
        if name not in self._plans:
            self._plans[name] = self._make(heads, kv_heads, window, dtype)
        return self._plans[name]

    def _make(self, heads: int, kv_heads: int, window: int | None, dtype: torch.dtype) -> AttentionPlan:
        total = self.groups[-1].stop * kv_heads
        from_queries, from_keys = np.empty(total, np.int64), np.empty(total, np.int64)
        chunks, queries_before, keys_before = [], 0, 0
        for group in self.groups:
            own, shared = max(group.lengths), len(group.path)
            at_once = max(1, BLOCK_SCORES // (heads * min(own, BLOCK_QUERIES) * (shared + own)))
            for first in range(0, len(group.lengths), at_once):
                nodes = slice(first, min(first + at_once, len(group.lengths)))
                places = _places(group, nodes, kv_heads)
                n = len(places)
                keys = np.concatenate([_path_rows(group, n, kv_heads), places], axis=2)
                real = keys[:, :, shared:] >= 0
                at = np.arange(keys.size).reshape(keys.shape)[:, :, shared:]
                from_keys[places[real]] = keys_before + at[real]
                blocks = []
                for low in range(0, own, BLOCK_QUERIES):
                    rows = places[:, :, low : low + BLOCK_QUERIES].reshape(-1)
                    there = rows >= 0
                    from_queries[rows[there]] = queries_before + np.flatnonzero(there)
                    queries_before += len(rows)
                    high = min(low + BLOCK_QUERIES, own)
                    blocks.append(self._block(rows, shared + low, shared + high, window, heads // kv_heads, dtype))
                keys_before += keys.size
                chunks.append(
                    Chunk(
                        self._index(keys.reshape(-1)),
                        n * kv_heads,
                        shared,
                        _as_path(group, self.device),
                        tuple(blocks),
                    )
                )
        return AttentionPlan(tuple(chunks), self._index(from_queries), self._index(from_keys))

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.maximum(rows, 0)).to(self.device)

    def _block(self, rows: np.ndarray, low: int, high: int, window: int | None, fold: int, dtype: torch.dtype) -> Block:
        """The block of the queries at positions low to high of [ancestors; own]. Padding stands right of all real
        queries, so that causality hides it from them."""
        first = 0 if window is None else max(0, low + 1 - window)
        query, key = np.arange(low, high)[:, None], np.arange(first, high)[None, :]
        mask = additive_mask(torch.from_numpy(in_reach(query, key, window)), dtype)
        padding = np.flatnonzero(rows < 0)
        return Block(
            queries=self._index(rows),
            keys=slice(first, high),
            mask=mask.repeat_interleave(fold, dim=0)[None].to(self.device),
            padding=self._index(padding) if len(padding) else None,
        )


def _weights(q: Tensor, k: Tensor, rule: Rule, mask: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention weights [B, queries, keys]. The softmax computes in float32 or wider.

    Args:
        q: [B, queries, D]; k: [B, keys, D].
        sinks: those of the queries, [B, queries, 1].
    """
    if rule.softcap is None:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=rule.scale)
    else:
        scores = capped(torch.bmm(q, k.transpose(1, 2)), rule).add_(mask)
    return attention_weights(scores, sinks).contiguous()


def _score_gradient(q: Tensor, k: Tensor, rule: Rule, share: Tensor, slope: Tensor) -> Tensor:
    """∂ of scale · q k, from the weights [B, queries, keys] and their gradient `slope`."""
    slope = torch.ops.aten._softmax_backward_data(slope, share, -1, share.dtype)
    if rule.softcap is not None:
        slope *= 1 - (capped(torch.bmm(q, k.transpose(1, 2)), rule) / rule.softcap).square_()
    return slope


def _sinks_of(sinks: Tensor | None, block: Block, q: Tensor, kv_heads: int) -> Tensor | None:
    """The sinks [H] of a block's queries q [B, queries · H/G, D]: [B, queries · H/G, 1]."""
    if sinks is None:
        return None
    each = sinks.to(q.dtype).view(1, kv_heads, 1, -1)
    fold = each.shape[-1]
    return each.expand(q.shape[0] // kv_heads, -1, q.shape[1] // fold, -1).reshape(*q.shape[:2], 1)


class _AttentionContext(Context, Protocol):
    plan: AttentionPlan
    rule: Rule
    kv_heads: int


class _Attention(torch.autograd.Function):
    """q [T · G, H/G · D], k [T · G, D] and v [T · G, E], by token and key head → [T · G, H/G · E]."""

    @staticmethod
    def forward(
        ctx: _AttentionContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: AttentionPlan,
        rule: Rule,
        kv_heads: int,
    ) -> Tensor:
        parts, kept = [], []
        for chunk in plan.chunks:
            keys, values = (x.index_select(0, chunk.keys).view(chunk.batch, -1, x.shape[1]) for x in (k, v))
            for block in chunk.blocks:
                queries = q.index_select(0, block.queries).view(chunk.batch, -1, k.shape[1])
                sink = _sinks_of(sinks, block, queries, kv_heads)
                share = _weights(queries, keys[:, block.keys], rule, block.mask, sink)
                parts.append(torch.bmm(share, values[:, block.keys]).view(len(block.queries), -1))
                kept.append(share if share.shape[-1] <= KEPT_KEYS else None)
        ctx.save_for_backward(q, k, v, sinks, *kept)
        ctx.plan, ctx.rule, ctx.kv_heads = plan, rule, kv_heads
        return torch.cat(parts).index_select(0, plan.from_queries)

    @staticmethod
    @once_differentiable
    def backward(ctx: _AttentionContext, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, *kept = ctx.saved_tensors
        plan, rule, waiting = ctx.plan, ctx.rule, iter(kept)
        for_queries, for_keys, for_values = [], [], []
        for chunk in plan.chunks:
            keys, values = (x.index_select(0, chunk.keys).view(chunk.batch, -1, x.shape[1]) for x in (k, v))
            sums: list[Tensor] = []
            for block in chunk.blocks:
                queries = q.index_select(0, block.queries).view(chunk.batch, -1, k.shape[1])
                given = grad.index_select(0, block.queries)
                if block.padding is not None:
                    given.index_fill_(0, block.padding, 0.0)
                given = given.view(chunk.batch, -1, v.shape[1])
                seen = keys[:, block.keys]
                share = next(waiting)
                if share is None:
                    share = _weights(queries, seen, rule, block.mask, _sinks_of(sinks, block, queries, ctx.kv_heads))
                slope = torch.bmm(given, values[:, block.keys].transpose(1, 2))
                slope = _score_gradient(queries, seen, rule, share, slope)
                for_queries.append(torch.bmm(slope, seen).view(len(block.queries), -1))
                each = torch.bmm(slope.transpose(1, 2), queries), torch.bmm(share.transpose(1, 2), given)
                sums = _add_up(sums, each, block.keys, keys.shape[1])
            for_keys.append(sums[0])
            for_values.append(sums[1])
        dq = torch.cat(for_queries).index_select(0, plan.from_queries).mul_(rule.scale)
        dk = _collect(for_keys, plan, ctx.kv_heads).mul_(rule.scale)
        return dq, dk, _collect(for_values, plan, ctx.kv_heads), None, None, None, None


def _add_up(sums: list[Tensor], each: Sequence[Tensor], keys: slice, count: int) -> list[Tensor]:
    """Add gradients of some keys [B, keys, D] to those of all `count` keys of a chunk."""
    if not sums and keys == slice(0, count):
        return list(each)
    sums = sums or [x.new_zeros(x.shape[0], count, x.shape[2]) for x in each]
    for total, part in zip(sums, each, strict=True):
        total[:, keys] += part
    return sums


def _collect(each: Sequence[Tensor], plan: AttentionPlan, kv_heads: int) -> Tensor:
    """The gradient of keys or values [T · G, D] from those of every chunk's keys [n · G, P + Q, D]."""
    width = each[0].shape[-1]
    total = torch.cat([x.view(-1, width) for x in each]).index_select(0, plan.from_keys)
    by_token = total.view(-1, kv_heads, width)
    for x, chunk in zip(each, plan.chunks, strict=True):
        if chunk.path is None:
            continue
        before = x.view(-1, kv_heads, x.shape[1], width)[:, :, : chunk.shared].sum(0).transpose(0, 1)
        if isinstance(chunk.path, slice):
            by_token[chunk.path] += before
        else:
            by_token.index_add_(0, chunk.path, before.contiguous())
    return total


def _attend(segments: PackedLayout, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """q [H, T, D], k [G, T, D], v [G, T, E] → [T, H, E]."""
    out = None if segments.gpu is None else attend(q, k, v, segments.gpu, rule)
    if out is None:
        out = _by_blocks(q, k, v, rule, segments)
    return out.transpose(0, 1).contiguous()


flat_attention = attention_function("segments", _attend)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, rule: Rule, layout: PackedLayout) -> Tensor:
    """q [H, T, D], k [G, T, D], v [G, T, E] → [H, T, E]."""
    plan = layout.plan(q.shape[0], k.shape[0], rule.window, q.dtype)
    rows = (x.transpose(0, 1).reshape(x.shape[1] * k.shape[0], -1) for x in (q, k, v))
    out: Tensor = _Attention.apply(*rows, rule.sinks, plan, rule, k.shape[0])
    return out.view(q.shape[1], q.shape[0], -1).transpose(0, 1)


def _plainly(q: Tensor, k: Tensor, v: Tensor, rule: Rule, groups: Sequence[Group]) -> Tensor:
    """The same without the device's kernels, which are compared with it."""
    return _by_blocks(q, k, v, rule, PackedLayout(groups, q.device, kernels=False))


def prepare_kernels(device: torch.device, run: Callable[[], object]) -> None:
    """Before a run: let `run` compute some packed sequence, and try the device's kernels on the kinds of attention that
    its layers ask for."""
    if device.type in KERNEL_DEVICES:
        try_postponed_again()
        run()
        try_kernels(_plainly)


# Only the function is registered, and no mask for it: transformers builds none for a name that it knows no mask of. For
# one that it knows, it first looks for packed rows in position_ids, and the host waits in each forward pass.
#
# Kept out of what torch.compile makes of a layer: its shapes and loops differ from batch to batch, and each would be
# compiled anew. FlexAttention is compiled on its own.
ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(flat_attention))


@contextlib.contextmanager
def flat(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the model computes one packed sequence; outside it, batches as usual (for generation)."""
    before = model.config._attn_implementation
    if before == NAME:
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[arg-type]  # a loaded model has one
