"""Attention over one flattened row, segment by segment, through transformers' public attention interface.

A flattened row holds the nodes of a prefix tree (tunery.data.batching). A node's tokens attend to all tokens of the
node's ancestors and causally to themselves; no row ever sees another. Groups of nodes with one parent are computed
together. Grouped-query heads, sliding windows, soft caps (Gemma 2) and attention sinks (gpt-oss) are honoured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunery.data.batching import Group
from tunery.models.attention_gpu import GpuLayout, Rule, attend

NAME = "tunery_flat"

MATRIX_PRODUCT_KEYS = 640
"""Up to this many keys, batched matrix products beat the fused kernel on a CPU (docs/lab.md)."""


@dataclass
class GroupLayout:
    """A group (tunery.data.batching.Group) on the device: n nodes padded to Q own tokens, P tokens of ancestors.

    `gather` [n·Q] and `valid` [sum of lengths] map the group's tokens to padded places and back; None where all nodes
    have the same length.
    """

    start: int
    stop: int
    nodes: int
    own: int
    path: Tensor | None
    gather: Tensor | None
    valid: Tensor | None
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, group: Group, device: torch.device) -> GroupLayout:
        """Prepare a group's index tensors once per batch."""
        nodes, own = len(group.lengths), max(group.lengths)
        gather = valid = None
        if min(group.lengths) != own:
            lengths = np.asarray(group.lengths)
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            inside = np.arange(own)[None, :] < lengths[:, None]
            places = np.where(inside, starts[:, None] + np.arange(own)[None, :], 0)
            gather = torch.from_numpy(places.reshape(-1)).to(device)
            valid = torch.from_numpy(np.flatnonzero(inside.reshape(-1))).to(device)
        path = torch.from_numpy(group.path).to(device) if len(group.path) else None
        return cls(group.start, group.stop, nodes, own, path, gather, valid)

    @property
    def shared(self) -> int:
        """P, the number of ancestors' tokens."""
        return 0 if self.path is None else len(self.path)

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """Which keys [ancestors; own] a query sees: bool [Q, P + Q]. Padding stands right of all real queries."""
        if window not in self.masks:
            query = self.shared + torch.arange(self.own, device=device)[:, None]
            key = torch.arange(self.shared + self.own, device=device)[None, :]
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            self.masks[window] = seen
        return self.masks[window]


class FlatLayout:
    """The attention pattern of one flattened row; given to the model as the keyword argument `segments`."""

    def __init__(self, groups: Sequence[Group], device: torch.device):
        self.device, self._groups = device, groups
        self.gpu = GpuLayout(groups, device) if device.type == "cuda" else None

    @functools.cached_property
    def groups(self) -> list[GroupLayout]:
        """The groups on the device; a GPU's own kernels do without them."""
        return [GroupLayout.of(group, self.device) for group in self._groups]


def _padded(x: Tensor, group: GroupLayout) -> Tensor:
    """[heads, T, D] → [heads, n, Q, D], the group's own tokens."""
    own = x[:, group.start : group.stop]
    if group.gather is not None:
        own = own.index_select(1, group.gather)
    return own.reshape(x.shape[0], group.nodes, group.own, x.shape[2])


def _by_matrix_products(
    q: Tensor, k: Tensor, v: Tensor, group: GroupLayout, scaling: float, window: int | None, cap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of one group as batched matrix products. q [H, T, D], k and v [G, T, D] → [H, n, Q, D of v].

    The H / G query heads that share a key head are folded into the rows of one product, and all nodes of the group
    into one product with the ancestors' keys, so neither is copied.
    """
    heads, kv_heads = q.shape[0], k.shape[0]
    fold, n, own, shared = heads // kv_heads, group.nodes, group.own, group.shared
    queries = _padded(q, group).view(kv_heads, fold, n, own, -1).transpose(1, 2) * scaling  # [G, n, H/G, Q, D]
    own_k, own_v = _padded(k, group), _padded(v, group)
    scores = torch.matmul(queries.reshape(kv_heads, n, fold * own, -1), own_k.transpose(-1, -2))
    scores = scores.view(kv_heads, n, fold, own, own)
    path_v = None
    if group.path is not None:
        path_k, path_v = k.index_select(1, group.path), v.index_select(1, group.path)
        before = torch.matmul(queries.reshape(kv_heads, n * fold * own, -1), path_k.transpose(-1, -2))
        scores = torch.cat([before.view(kv_heads, n, fold, own, shared), scores], dim=-1)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~group.mask(window, q.device), float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(kv_heads, 1, fold, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    share = F.softmax(scores, dim=-1).to(v.dtype)
    own_share = share[..., shared : shared + own].reshape(kv_heads, n, fold * own, own)
    out = torch.matmul(own_share, own_v).view(kv_heads, n, fold, own, -1)
    if path_v is not None:
        before = share[..., :shared].reshape(kv_heads, n * fold * own, shared)
        out = out + torch.matmul(before, path_v).view_as(out)
    return out.transpose(1, 2).reshape(heads, n, own, -1)


def _by_fused_kernel(q: Tensor, k: Tensor, v: Tensor, group: GroupLayout, scaling: float, window: int | None) -> Tensor:
    """Attention of one group through scaled_dot_product_attention: no score matrix is kept. Shapes as above."""
    queries, keys, values = (_padded(x, group).transpose(0, 1) for x in (q, k, v))  # [n, heads, Q, D]
    if group.path is not None:
        keys, values = (
            torch.cat([x.index_select(1, group.path).expand(group.nodes, -1, -1, -1), own], dim=2)
            for x, own in ((k, keys), (v, values))
        )
    causal = group.path is None and window is None
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=None if causal else group.mask(window, q.device),
        is_causal=causal,
        scale=scaling,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return out.transpose(0, 1)


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segments: FlatLayout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, G, T, D] → ([1, T, H, D], None)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query[0], key[0], value[0]

    def by_groups(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        return _by_groups(q, k, v, segments, scale, sliding_window, softcap, sinks)

    out = None
    if segments.gpu is not None:
        out = attend(q, k, v, segments.gpu, Rule(scale, sliding_window, softcap, s_aux), by_groups)
    if out is None:
        out = by_groups(q, k, v, s_aux)
    return out.transpose(0, 1).unsqueeze(0).contiguous(), None


def _by_groups(
    q: Tensor, k: Tensor, v: Tensor, segments: FlatLayout, scale: float, sliding_window: int | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of all groups, one after the other. q [H, T, D], k [G, T, D], v [G, T, E] → [H, T, E]."""
    parts = []
    for group in segments.groups:
        keys = group.shared + group.own
        window = sliding_window if sliding_window is not None and sliding_window < keys else None
        special = softcap is not None or sinks is not None
        if special or (keys <= MATRIX_PRODUCT_KEYS and q.device.type == "cpu"):
            out = _by_matrix_products(q, k, v, group, scale, window, softcap, sinks)
        else:
            out = _by_fused_kernel(q, k, v, group, scale, window)
        out = out.reshape(q.shape[0], group.nodes * group.own, -1)
        parts.append(out if group.valid is None else out.index_select(1, group.valid))
    return torch.cat(parts, dim=1)


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout says who sees whom; a mask of T x T is never built."""


# Kept out of what torch.compile makes of a layer: its shapes and loops differ from batch to batch, and each would be
# compiled anew. FlexAttention is compiled on its own.
ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(flat_attention))
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


@contextlib.contextmanager
def flat(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes one flattened row; outside it, batches as usual (for generation)."""
    before = model.config._attn_implementation  # type: ignore[union-attr]
    if before == NAME:
        yield
        return
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
