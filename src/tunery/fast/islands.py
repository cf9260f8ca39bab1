"""The element-wise parts of a decoder, forward and backward, each as one function of tensors.

`_name` is what a compiler fuses into one kernel; `_name_eager`, where there is one, gives the same in few passes over
memory, in place where it owns a tensor. Statistics are taken in float32 or wider ("wide").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tunery.fast.compile import Island


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------- RMSNorm


def _rms_norm(x: Tensor, weight: Tensor, eps: float, wide_product: bool) -> tuple[Tensor, Tensor]:
    unit = x.to(_wide(x.dtype))
    scale = torch.rsqrt(unit.square().mean(-1, keepdim=True) + eps)
    unit = unit * scale
    return ((unit * weight) if wide_product else unit.to(x.dtype) * weight).to(x.dtype), scale


def _rms_norm_eager(x: Tensor, weight: Tensor, eps: float, wide_product: bool) -> tuple[Tensor, Tensor]:
    dtype = _wide(x.dtype)
    unit = x.to(dtype)
    length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    scale = torch.rsub(length.square_(), eps, alpha=-1 / x.shape[-1]).rsqrt_()  # rsub: eps + length² / d
    unit = unit * scale if unit is x else unit.mul_(scale)
    return (unit.mul_(weight).to(x.dtype) if wide_product else unit.to(x.dtype).mul_(weight)), scale


rms_norm = Island(_rms_norm, _rms_norm_eager)
"""(y, scale) with scale = 1 / sqrt(mean(x²) + eps) and y = x · scale · weight (Zhang and Sennrich 2019,
arXiv:1910.07467).

Args (x, weight, eps, wide_product): x [..., d]; weight [d], in the dtype of x unless wide_product, which multiplies it
in before rounding to that dtype (Gemma, gpt-oss), not after. scale is [..., 1], wide."""


def _add_rms_norm(
    x: Tensor, more: Tensor, weight: Tensor, eps: float, wide_product: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + more
    return total, *_rms_norm(total, weight, eps, wide_product)


def _add_rms_norm_eager(
    x: Tensor, more: Tensor, weight: Tensor, eps: float, wide_product: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + more
    return total, *_rms_norm_eager(total, weight, eps, wide_product)


add_rms_norm = Island(_add_rms_norm, _add_rms_norm_eager)
"""(x + more, y, scale): `rms_norm` of a residual sum, which is needed as well.

Args (x, more, weight, eps, wide_product)."""


def _rms_norm_backward(grad: Tensor, around: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    wide = scale.dtype
    unit = x.to(wide) * scale
    slope = grad.to(wide) * weight
    found = (slope - unit * (slope * unit).mean(-1, keepdim=True)) * scale
    return (found if around is None else around.to(wide) + found).to(x.dtype)


def _rms_norm_backward_eager(grad: Tensor, around: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    wide = scale.dtype
    slope = grad.to(wide)
    slope = slope * weight if slope is grad else slope.mul_(weight)
    values = x.to(wide)
    along = torch.linalg.vecdot(slope, values).unsqueeze(-1).mul_(scale.pow(3)).div_(-x.shape[-1])
    if around is None:
        found = slope.mul_(scale)
    elif around.dtype == wide:
        found = torch.addcmul(around, slope, scale)
    else:
        found = around.to(wide).addcmul_(slope, scale)
    return found.addcmul_(values, along).to(x.dtype)


rms_norm_backward = Island(_rms_norm_backward, _rms_norm_backward_eager)
"""∂/∂x of `rms_norm`, plus the gradient that reaches x around the norm, along the residual connection, if there is one.

Args (grad, around, x, weight, scale): grad, around and x [..., d]."""


# --------------------------------------------------------------------------- the gated unit


def _gelu_backward(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, lambda grad, x: _gelu_backward(grad, x, "none")),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: _gelu_backward(grad, x, "tanh"),
    ),
}
"""Name → (act(x), grad · act'(x)), elementwise."""


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](gate) * up


def _gated_eager(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](gate).mul_(up)


gated = Island(_gated, _gated_eager)
"""act(gate) · up (Shazeer 2020, arXiv:2002.05202). Args (gate, up, activation), the last of ACTIVATIONS."""


def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    act, act_backward = ACTIVATIONS[activation]
    opened = act(gate)
    return opened * up, act_backward(grad * up, gate), opened * grad


def _gated_backward_eager(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    if activation == "silu" and gate.dtype == _wide(gate.dtype):
        # One exponential instead of two: act' = σ + σ (gate - act). In half precision the roundings between would show.
        slope = torch.sigmoid(gate)
        opened = gate * slope
        slope.addcmul_(slope, gate - opened)
        product = opened * up
        d_up = opened.mul_(grad)
        return product, grad.mul_(up).mul_(slope), d_up
    act, act_backward = ACTIVATIONS[activation]
    opened = act(gate)
    product = opened * up
    d_up = opened.mul_(grad)
    return product, act_backward(grad.mul_(up), gate), d_up


gated_backward = Island(_gated_backward, _gated_backward_eager)
"""(act(gate) · up, ∂/∂gate, ∂/∂up) from the gradient of act(gate) · up, which is used up.

Args (grad, gate, up, activation)."""


# --------------------------------------------------------------------------- rotary position embeddings


def _rotated(x: Tensor, cos: Tensor, low: Tensor, high: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:] * low, x[..., :half] * high), dim=-1)


def _rotated_eager(x: Tensor, cos: Tensor, low: Tensor, high: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    if x.dtype == _wide(x.dtype):
        out[..., :half].addcmul_(x[..., half:], low, value=-sign)
        out[..., half:].addcmul_(x[..., :half], high, value=sign)
    else:  # each product is rounded, as transformers does
        out[..., :half].add_(x[..., half:] * low, alpha=-sign)
        out[..., half:].add_(x[..., :half] * high, alpha=sign)
    return out


def _halves(sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    half = sin.shape[-1] // 2
    low, high = sin[..., :half], sin[..., half:]
    return (low, high) if sign > 0 else (high, low)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    low, high = _halves(sin, sign)
    return _rotated(q, cos, sign * low, sign * high), _rotated(k, cos, sign * low, sign * high)


def _rotate_eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    low, high = _halves(sin, sign)
    return _rotated_eager(q, cos, low, high, sign), _rotated_eager(k, cos, low, high, sign)


rotate = Island(_rotate, _rotate_eager)
"""Queries and keys turned by their positions (Su et al. 2021, arXiv:2104.09864): x · cos + (-x₂, x₁) · sin for
x = (x₁, x₂).

Args (q, k, cos, sin, sign): q and k [..., D], cos and sin of any shape that broadcasts to theirs; sign 1, or -1 for the
gradients of q and k from those of the results."""


# --------------------------------------------------------------------------- cross-entropy


def _finished(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = logits.to(_wide(logits.dtype)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _softmax_sums(logits: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    z = _finished(logits, scale, softcap)
    return torch.logsumexp(z, dim=-1), z.argmax(dim=-1)


def _softmax_gradient(
    logits: Tensor, log_total: Tensor, weights: Tensor, scale: float, softcap: float | None
) -> Tensor:
    z = _finished(logits, scale, softcap)
    delta = torch.exp(z - log_total[:, None]) * weights[:, None]
    if softcap is not None:
        delta = delta * (1 - (z / softcap).square())
    return delta.to(logits.dtype)


softmax_sums = Island(_softmax_sums)
"""(log Σ exp z [n], argmax z [n]) of raw logits [n, V], with z = softcap · tanh(scale · logits / softcap), or
scale · logits without a soft cap. Args (logits, scale, softcap); wide."""

softmax_gradient = Island(_softmax_gradient)
"""∂/∂(scale · logits) of Σ weights · log Σ exp z: the gradient of a cross-entropy everywhere but at its targets. [n, V]
in the dtype of the logits. Args (logits, log_total [n], weights [n], scale, softcap)."""
