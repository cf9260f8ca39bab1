"""Linear layers with LoRA as one step of automatic differentiation.

For layers i that share their input x (query, key and value; gate and up), with frozen W_i and trained A_i, B_i:

    y_i = W_i x + b_i + s_i B_i A_i x

Written out operation by operation, PyTorch keeps the intermediates of each and launches many small kernels. Here the
A_i are stacked into one product, x is kept once, updates are added in place (`addmm_`), and of the intermediates only
A x ([T, rank], thin) is kept. The sums are those of the plain path (tunery.lora.layer.add_lora) in another order. The
idea of writing the backward pass by hand, and of keeping only x and the adapters, is Unsloth's and LoRAFusion's
(Zhu et al. 2025, arXiv:2510.00206); the code is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Part:
    """One layer: W [out, in] (a view is fine), its bias or None, A [rank, in], B [out, rank] and the scaling s."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float


def lora_linears(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Outputs of layers that share their input.

    Args:
        x: [..., in], in the number format of the weights.

    Returns:
        One [..., out] for each part, in that format.
    """
    outs = _LoRALinears.apply(
        x.flatten(0, -2), [(p.weight, p.bias, p.scaling) for p in parts],
        *(t for p in parts for t in (p.A, p.B)),
    )  # fmt: skip
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outs)


def gated_mlp(x: Tensor, gate: Part, up: Part, down: Part, activation: str) -> Tensor:
    """down(act(gate(x)) · up(x)), the feed-forward block of Llama and its kin (Shazeer 2020, arXiv:2002.05202).

    Kept for the backward pass: x, gate(x) and up(x); their product is computed again there.

    Args:
        x: [..., width].
        activation: of ACTIVATIONS.

    Returns:
        [..., width].
    """
    parts = (gate, up, down)
    y = _GatedMLP.apply(
        x.flatten(0, -2), [(p.weight, p.bias, p.scaling) for p in parts], activation,
        *(t for p in parts for t in (p.A, p.B)),
    )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[-1])


# --------------------------------------------------------------------------- pieces of both functions

_Frozen = Sequence[tuple[Tensor, Tensor | None, float]]


def _narrow(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """(A stacked, each B) in the model's number format, from A_1, B_1, A_2, B_2, …"""
    As, Bs = tensors[0::2], tensors[1::2]
    A = As[0] if len(As) == 1 else torch.cat(list(As))
    return A.to(dtype), [B.to(dtype) for B in Bs]


def _forward(x: Tensor, frozen: _Frozen, A: Tensor, Bs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(y_i, A x) for x [T, in]."""
    h = torch.mm(x, A.t())
    outs, at = [], 0
    for (weight, bias, scaling), B in zip(frozen, Bs, strict=True):
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        outs.append(y.addmm_(h[:, at : at + B.shape[1]], B.t(), alpha=scaling))
        at += B.shape[1]
    return outs, h


def _through_B(grads: Sequence[Tensor], frozen: _Frozen, Bs: Sequence[Tensor]) -> Tensor:
    """The gradient of A x, [T, sum of ranks]."""
    thin = [torch.mm(g, B).mul_(scaling) for g, B, (_, _, scaling) in zip(grads, Bs, frozen, strict=True)]
    return thin[0] if len(thin) == 1 else torch.cat(thin, dim=1)


def _input_gradient(grads: Sequence[Tensor], frozen: _Frozen, A: Tensor, thin: Tensor) -> Tensor:
    """∂/∂x [T, in]: through every W_i and, by way of `thin`, through the stacked A."""
    dx = torch.mm(grads[0], frozen[0][0])
    for g, (weight, _, _) in zip(grads[1:], frozen[1:], strict=True):
        dx.addmm_(g, weight)
    return dx.addmm_(thin, A)


def _adapter_gradients(
    x: Tensor, h: Tensor, grads: Sequence[Tensor], frozen: _Frozen, Bs: Sequence[Tensor], thin: Tensor,
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:  # fmt: skip
    """∂/∂A_1, ∂/∂B_1, ∂/∂A_2, … in the adapters' own number format."""
    dA = torch.mm(thin.t(), x)
    found, at = [], 0
    for g, (_, _, scaling), B, dtype in zip(grads, frozen, Bs, dtypes, strict=True):
        end = at + B.shape[1]
        found.append(dA[at:end].to(dtype))
        dB = torch.mm(h[:, at:end].t(), g).to(dtype).mul_(scaling)  # [rank, out]: the quicker way round on a CPU
        found.append(dB.t().contiguous())
        at = end
    return found


def _complete(grads: Sequence[Tensor | None], frozen: _Frozen, x: Tensor) -> list[Tensor]:
    """Zeros for outputs that nothing was computed from."""
    shapes = [(x.shape[0], weight.shape[0]) for weight, _, _ in frozen]
    return [x.new_zeros(shape) if g is None else g for g, shape in zip(grads, shapes, strict=True)]


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: _Frozen, *adapters: Tensor) -> tuple[Tensor, ...]:
        A, Bs = _narrow(adapters, x.dtype)
        outs, h = _forward(x, frozen, A, Bs)
        ctx.save_for_backward(x, h, A, *Bs)
        ctx.frozen, ctx.dtypes = frozen, [B.dtype for B in adapters[1::2]]
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, A, *Bs = ctx.saved_tensors
        grads = _complete(given, ctx.frozen, x)
        thin = _through_B(grads, ctx.frozen, Bs)
        dx = _input_gradient(grads, ctx.frozen, A, thin) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return (dx, None, *[None] * (2 * len(Bs)))
        return (dx, None, *_adapter_gradients(x, h, grads, ctx.frozen, Bs, thin, ctx.dtypes))


# --------------------------------------------------------------------------- the gated feed-forward block


def _gelu_backward(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)


ACTIVATIONS = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, lambda grad, x: _gelu_backward(grad, x, "none")),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: _gelu_backward(grad, x, "tanh"),
    ),
}
"""Name → (act(x), grad · act'(x)), elementwise."""


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: _Frozen, activation: str, *adapters: Tensor) -> Tensor:
        act, _ = ACTIVATIONS[activation]
        A, Bs = _narrow(adapters[:4], x.dtype)
        A_down, B_down = _narrow(adapters[4:], x.dtype)
        (gate, up), h = _forward(x, frozen[:2], A, Bs)
        (y,), h_down = _forward(act(gate).mul_(up), frozen[2:], A_down, B_down)
        ctx.save_for_backward(x, h, gate, up, h_down, A, *Bs, A_down, *B_down)
        ctx.frozen, ctx.activation, ctx.dtypes = frozen, activation, [B.dtype for B in adapters[1::2]]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, gate, up, h_down, A, B_gate, B_up, A_down, B_down = ctx.saved_tensors
        act, act_backward = ACTIVATIONS[ctx.activation]
        first, last, Bs = ctx.frozen[:2], ctx.frozen[2:], (B_gate, B_up)
        train = any(ctx.needs_input_grad[3:])
        thin_down = _through_B([grad], last, [B_down])
        inner = _input_gradient([grad], last, A_down, thin_down)
        opened = act(gate)
        down = []
        if train:
            down = _adapter_gradients(
                opened * up, h_down, [grad], last, [B_down], thin_down, ctx.dtypes[2:]
            )  # fmt: skip
        d_up = opened.mul_(inner)
        d_gate = act_backward(inner.mul_(up), gate)
        grads = [d_gate, d_up]
        thin = _through_B(grads, first, Bs)
        dx = _input_gradient(grads, first, A, thin) if ctx.needs_input_grad[0] else None
        if not train:
            return (dx, None, None, *[None] * 6)
        return (dx, None, None, *_adapter_gradients(x, h, grads, first, Bs, thin, ctx.dtypes[:2]), *down)
