"""The element-wise parts of a decoder layer as pure functions, for the part `islands` to compile.

Copies that stand here until tunery has such functions itself; then the table CASES names those, and these go.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(normalised [T, d], scale [T, 1]); Zhang and Sennrich 2019, arXiv:1910.07467."""
    unit = wide(x)
    scale = torch.rsqrt(unit.square().mean(-1, keepdim=True) + EPS)
    return (unit * scale).to(x.dtype) * weight, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, around: Tensor) -> Tensor:
    """∂L/∂x [T, d], with the gradient that reaches x around the norm added."""
    unit = wide(x) * scale
    slope = wide(grad) * wide(weight)
    along = (slope * unit).mean(-1, keepdim=True)
    return ((slope - unit * along) * scale).to(x.dtype) + around


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, [T, f]."""
    return F.silu(gate) * up


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(gate) · up again, ∂L/∂gate, ∂L/∂up), [T, f] each."""
    share = torch.sigmoid(wide(gate))
    opened = wide(gate) * share
    slope = share + opened * (1 - share)
    found = opened * wide(up), wide(grad) * wide(up) * slope, wide(grad) * opened
    return tuple(x.to(gate.dtype) for x in found)  # type: ignore[return-value]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): q [T, H, D], k [T, G, D], cos and sin [T, D/2]."""

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    return turn(q), turn(k)


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(−log softmax at the targets [n], its weighted gradient [n, V]) of logits [n, V]."""
    z = wide(logits)
    top = z.amax(-1, keepdim=True)
    power = torch.exp(z - top)
    total = power.sum(-1, keepdim=True)
    loss = (total.log() + top - z.gather(1, target[:, None]))[:, 0]
    hit = torch.arange(z.shape[1], device=z.device)[None] == target[:, None]
    return loss, ((power / total - hit.to(power.dtype)) * weight[:, None]).to(logits.dtype)
