"""Attention of one step over cached keys and values, through transformers' public attention interface.

A step is one packed sequence [1, T] of tokens of many rows. A row gives either one token (it is decoding, or one
token of its prompt is left) or a stretch of its prompt. The single tokens of a shelf are computed together, as a
batch over its slots: the queries that share a key head are folded into one matrix, so that no key is copied, and a
mask hides what is beyond each row's length. Stretches are computed one by one. Sliding windows, soft caps (Gemma 2)
and attention sinks (gpt-oss) are honoured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunery.fast.attention_rule import (
    Rule,
    additive_mask,
    attention_function,
    attention_weights,
    capped,
    in_reach,
)
from tunery.inference.kv_cache import BlockPool, LayerShape

NAME = "tunery_served"

STRIDE = 64
"""Keys of a batched product are rounded up to a multiple of this: libraries prepare code for each shape."""

FEW_QUERIES = 16
"""Up to so many queries a head, PyTorch's own attention on a CPU is slower than its steps one by one."""

BLOCK_QUERIES = 256
"""Queries of a stretch that are computed together."""

KEPT_MASK = 1 << 23
"""Masks of a stretch with up to so many numbers are kept for the other layers."""

WRITTEN_OUT = 1 << 22
"""Most scores that are held at once where attention is written out."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
    """Softmax attention, q [B, G, N, D], k [B, G, L, D], v [B, G, L, E] → [B, G, N, E].

    Args:
        mask: added to the scores, [B or 1, 1, N or 1, L] in the dtype of q.
        sinks: [1, G, N, 1], or None.
    """
    few = q.device.type == "cpu" and q.shape[2] <= FEW_QUERIES
    if rule.softcap is None and sinks is None and not few:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)
    at_once = max(1, WRITTEN_OUT // (q.shape[0] * q.shape[1] * k.shape[2]))
    if few or at_once >= q.shape[2]:
        return _written_out(q, k, v, mask, rule, sinks)
    parts = []
    for low in range(0, q.shape[2], at_once):
        rows = slice(low, low + at_once)
        seen = mask if mask.shape[2] == 1 else mask[:, :, rows]
        parts.append(_written_out(q[:, :, rows], k, v, seen, rule, None if sinks is None else sinks[:, :, rows]))
    return torch.cat(parts, dim=2)


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
    """As `attend`, operation by operation; the softmax in float32 or wider.

    The scores are taken as k q, not q k: with a few queries and many keys that is up to four times faster on a CPU.
    """
    scores = torch.matmul(k, q.transpose(-1, -2)).transpose(-1, -2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide, memory_format=torch.contiguous_format)
    if rule.softcap is None:
        scores = torch.add(mask, scores, alpha=rule.scale)
    else:
        scores = capped(scores, rule).add_(mask)
    if sinks is not None:
        sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.matmul(attention_weights(scores, sinks).to(v.dtype), v)


MaskKey = tuple[int, int, int | None, torch.dtype]
"""Of a stretch's mask: its first position, query heads for each key head, window, dtype."""


@dataclass(slots=True)
class DecodeBatch:
    """The rows of one shelf that give a single token each.

    Attributes:
        at: where these tokens stand in the packed sequence.
        slots: int64 [n], ascending.
        positions: int64 [n], of the tokens; the keys before them are in the cache.
        longest, shortest: the largest and the smallest position, plus one.
        span: one past the last slot.
    """

    shelf: BlockPool
    at: slice
    slots: Tensor
    positions: Tensor
    longest: int
    shortest: int
    span: int
    _rows: dict[int, Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int | None, torch.dtype], tuple[int, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """Store the keys and values, and attend. q [n, H, D], k [n, G, D], v [n, G, E] → [n, H, E]."""
        keys, values = self.shelf.slabs.layers[layer]
        groups, count = k.shape[1], q.shape[0]
        rows = self._written(groups)
        keys.view(-1, k.shape[2]).index_copy_(0, rows, k.reshape(-1, k.shape[2]))
        values.view(-1, v.shape[2]).index_copy_(0, rows, v.reshape(-1, v.shape[2]))
        if self.span != count:  # slots between these rows' are computed too, on whatever stands there
            q = q.new_zeros(self.span, *q.shape[1:]).index_copy_(0, self.slots, q)
        low, mask = self._mask(rule.window, q.dtype)
        folded = q.reshape(self.span, groups, -1, q.shape[-1])
        sinks = None if rule.sinks is None else rule.sinks.view(1, groups, -1, 1)
        seen = slice(low, low + mask.shape[-1])
        out = attend(folded, keys[: self.span, :, seen], values[: self.span, :, seen], mask, rule, sinks)
        out = out.reshape(self.span, -1, v.shape[-1])
        return out if self.span == count else out.index_select(0, self.slots)

    def _written(self, groups: int) -> Tensor:
        """Where the new keys go: rows of the slab seen as [slots · G · capacity, D]."""
        if groups not in self._rows:
            heads = torch.arange(groups, device=self.slots.device)
            rows = (self.slots[:, None] * groups + heads) * self.shelf.capacity + self.positions[:, None]
            self._rows[groups] = rows.reshape(-1)
        return self._rows[groups]

    def _mask(self, window: int | None, dtype: torch.dtype) -> tuple[int, Tensor]:
        """(first key, mask [span, 1, 1, keys]) with which every row sees its own keys, and only those of its window."""
        if window is not None and window >= self.longest:
            window = None
        if (window, dtype) not in self._masks:
            low = 0 if window is None else max(0, self.shortest - window) // STRIDE * STRIDE
            high = min(self.shelf.capacity, -(-self.longest // STRIDE) * STRIDE)
            last = self.positions.new_zeros(self.span).index_copy_(0, self.slots, self.positions)[:, None]
            key = torch.arange(low, high, device=last.device)[None, :]
            mask = additive_mask(in_reach(last, key, window), dtype)
            self._masks[window, dtype] = low, mask[:, None, None, :]
        return self._masks[window, dtype]


@dataclass(slots=True)
class PrefillChunk:
    """Successive tokens of one row's prompt.

    Attributes:
        at: where they stand in the packed sequence.
        start, stop: their positions.
    """

    shelf: BlockPool
    slot: int
    at: slice
    start: int
    stop: int
    _masks: dict[MaskKey, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """Store the keys and values, and attend. q [n, H, D], k [n, G, D], v [n, G, E] → [n, H, E]."""
        keys, values = (slab[self.slot] for slab in self.shelf.slabs.layers[layer])
        keys[:, self.start : self.stop] = k.transpose(0, 1)
        values[:, self.start : self.stop] = v.transpose(0, 1)
        return stretch_attention(q, keys, values, self.start, rule, self._masks)


def stretch_attention(
    q: Tensor, keys: Tensor, values: Tensor, start: int, rule: Rule, masks: dict[MaskKey, Tensor]
) -> Tensor:
    """Causal attention of successive tokens of one row.

    Args:
        q: [n, H, D], of the positions from `start` on.
        keys: [G, at least start + n, D]; values: [G, …, E].
        masks: those made before, for the other layers of the step.

    Returns:
        [n, H, E].
    """
    count, groups = q.shape[0], keys.shape[0]
    if count > BLOCK_QUERIES:  # what a block's last query does not see is not computed
        blocks = [
            stretch_attention(q[low : low + BLOCK_QUERIES], keys, values, start + low, rule, masks)
            for low in range(0, count, BLOCK_QUERIES)
        ]
        return torch.cat(blocks)
    fold, stop = q.shape[1] // groups, start + count
    window = rule.window if rule.window is not None and rule.window < stop else None
    low = 0 if window is None else max(0, start + 1 - window)
    name = start, fold, window, q.dtype
    if (mask := masks.get(name)) is None:
        mask = _causal_mask(range(start, stop), range(low, stop), window, fold, q)
        if mask.numel() <= KEPT_MASK:
            masks[name] = mask
    folded = q.transpose(0, 1).reshape(1, groups, fold * count, -1)
    sinks = None
    if rule.sinks is not None:
        sinks = rule.sinks.view(groups, fold).repeat_interleave(count, dim=1)[None, :, :, None]
    out = attend(folded, keys[None, :, low:stop], values[None, :, low:stop], mask, rule, sinks)
    return out.view(groups * fold, count, -1).transpose(0, 1)


def _causal_mask(queries: range, keys: range, window: int | None, fold: int, like: Tensor) -> Tensor:
    """A mask [1, 1, fold · queries, keys] with which a query sees the keys up to its own, and of its window."""
    query = torch.arange(queries.start, queries.stop, device=like.device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=like.device)[None, :]
    return additive_mask(in_reach(query, key, window), like.dtype).repeat(fold, 1)[None, None]


class CachedLayers(Protocol):
    """What the model's attention layers call, one after another."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """The next layer: q [T, H, D], k [T, G, D], v [T, G, E] → [T, H, E]."""
        ...


class Layout:
    """The attention of one step; given to the model as the keyword argument `served`. Its layers call in order.

    Args:
        parts: covering the packed sequence in order.
    """

    def __init__(self, parts: Sequence[DecodeBatch | PrefillChunk]):
        self.parts = parts
        self._layer = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """See CachedLayers."""
        layer, self._layer = self._layer, self._layer + 1
        outs = [part.attend(layer, q[part.at], k[part.at], v[part.at], rule) for part in self.parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class AttentionWatcher:
    """Attends over a single row without a cache, and notes the shapes of the layers."""

    def __init__(self) -> None:
        self.shapes: list[LayerShape] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """See CachedLayers."""
        self.shapes.append(LayerShape(k.shape[1], k.shape[2], v.shape[2]))
        return stretch_attention(q, k.transpose(0, 1), v.transpose(0, 1), 0, rule, {})


def _attend(served: CachedLayers, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """q [H, T, D], k [G, T, D], v [G, T, E] → [T, H, E]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return served.attend(q, k, v, rule)


# The layout says who sees whom. No mask is registered: see the end of tunery.fast.attention.
ALL_ATTENTION_FUNCTIONS.register(NAME, attention_function("served", _attend))
