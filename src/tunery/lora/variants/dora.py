"""DoRA, weight-decomposed LoRA: Liu et al. 2024, arXiv:2402.09353, section 4.

The weight's direction and its magnitude are trained apart: with V = W + s · B A and a trained vector m [out],

    W' = (m / ‖V‖) V        row by row; ‖·‖ is the norm of a row (the paper writes weights transposed: of a column)

m starts at ‖W‖, so training starts from the base exactly. As in the paper's section 4.3 no gradient flows through ‖V‖.
V is never written down for its norm: with U = W Aᵀ [out, rank],

    ‖V‖² = ‖W‖² + 2 s ⟨U, B⟩ + s² ⟨B A Aᵀ, B⟩        row by row
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tunery.lora.variants.base import Update, Variant
from tunery.lora.variants.lora import delta_weight
from tunery.models.typed import norm

if TYPE_CHECKING:
    from tunery.lora.layer import LoRALinear

MAGNITUDE = "lora_magnitude_vector"


class DoRA(Variant):
    """y = (m / ‖W + s · B A‖) (W x + s · B A dropout(x)) + b."""

    name = "dora"
    title = "DoRA"
    tensors = (MAGNITUDE,)
    peft: ClassVar[Mapping[str, object]] = {"use_dora": True}

    def start(self, weight: Tensor) -> dict[str, Tensor]:
        return {MAGNITUDE: norm(weight, dim=1)}

    def output(self, layer: LoRALinear, x: Tensor, name: str) -> Tensor:
        update = layer.update(name)
        y = layer.base(x)
        dropped = layer.dropouts[name](x, layer.training)
        wide = torch.promote_types(y.dtype, update.A.dtype)
        core = y.to(wide) if layer.bias is None else y.to(wide) - layer.bias.to(wide)
        low = F.linear(F.linear(dropped, update.A.to(x.dtype)), update.B.to(x.dtype)).to(wide)
        gain = update.extra[MAGNITUDE] / row_norms(layer.dense_weight(), update)
        out = gain.to(wide) * (core + update.scaling * low)
        return (out if layer.bias is None else out + layer.bias.to(wide)).to(y.dtype)

    def merged(self, weight: Tensor, update: Update) -> Tensor:
        direction = weight + delta_weight(update.A, update.B, update.scaling)
        gain = update.extra[MAGNITUDE] / _above_zero(norm(direction, dim=1))
        return gain[:, None] * direction


@torch.no_grad()
def row_norms(weight: Tensor, update: Update) -> Tensor:
    """‖W + s · B A‖ of each row, [out], at least float32.

    Args:
        weight: W [out, in], at least float32.
    """
    A, B, s = update.A.to(weight.dtype), update.B.to(weight.dtype), update.scaling
    across = ((weight @ A.t()) * B).sum(dim=1)
    own = ((B @ (A @ A.t())) * B).sum(dim=1)
    return _above_zero((weight.square().sum(dim=1) + 2 * s * across + s * s * own).clamp_min(0).sqrt())


def _above_zero(norms: Tensor) -> Tensor:
    """Norms that can be divided by: a row of zeros, as pruned or padded bases have, stays zero."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)
