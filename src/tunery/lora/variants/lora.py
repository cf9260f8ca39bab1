"""LoRA as it was published: Hu et al. 2021, arXiv:2106.09685, section 4.1. W + s · B A."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tunery.lora.variants.base import Update, Variant

if TYPE_CHECKING:
    from tunery.lora.layer import LoRALinear


class LoRA(Variant):
    """y = W x + b + s · B A dropout(x)."""

    name = "lora"
    title = "LoRA"
    additive = True
    embeddings = True

    def output(self, layer: LoRALinear, x: Tensor, name: str) -> Tensor:
        y = layer.base(x)
        x = layer.dropouts[name](x, layer.training)
        return add_lora(y, x, layer.lora_A[name], layer.lora_B[name], layer.settings[name].scaling)

    def merged(self, weight: Tensor, update: Update) -> Tensor:
        return weight + delta_weight(update.A, update.B, update.scaling)


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """ΔW = s · B A, [out, in], for A [rank, in] and B [out, rank].

    A table of embeddings [vocabulary, width] is the weight of a linear layer the other way round: its ΔW is that of
    A = Bᵀ and B = Aᵀ.
    """
    return scaling * (B @ A)


def add_lora(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + scaling · B A x, for every row of x.

    Args:
        y: output of the base layer, [..., out].
        x: the adapter's input, [..., in].
        A: [rank, in]; cast to the dtype of x.
        B: [out, rank]; cast to that of y.

    Returns:
        [..., out], in the dtype of y.
    """
    return add_up(y, F.linear(x, A.to(x.dtype)), B, scaling)


def add_up(y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + scaling · B h in one pass: y [..., out], h [..., rank], B [out, rank]."""
    rows = torch.addmm(y.flatten(0, -2), h.to(y.dtype).flatten(0, -2), B.to(y.dtype).t(), alpha=scaling)
    return rows.view(y.shape)


def add_up_(y: Tensor, h: Tensor, Bt: Tensor, scaling: float = 1.0) -> Tensor:
    """y += scaling · B h in place: y [T, out], h [T, rank], Bᵀ [rank, out], all in one dtype. For passes without
    autograd."""
    return y.addmm_(h, Bt, alpha=scaling)
