"""A stand-in for variable-length flash attention, which runs on a GPU only; it reads its arguments as PyTorch's
documentation says."""

from __future__ import annotations

import torch
from torch import Tensor


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """q [T, H, D], k [T, G, D], v [T, G, E] → [T, H, E]."""
    parts = []
    for low, high in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        place = torch.arange(high - low)
        back = place[:, None] - place[None, :]
        seen = (back >= -window_size[1]) & ((back <= window_size[0]) | (window_size[0] < 0))
        keys, values = (x[low:high].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[low:high], keys) * scale
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values))
    return torch.cat(parts)
