"""RMSNorm as one step of automatic differentiation, put in the place of a model's own.

transformers writes the norm out in float32, and PyTorch keeps two float32 copies of the input for each. Here only the
input itself and one number a row are kept. A norm is replaced only if ours, on random numbers, gives what it gives.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 0.0}
"""Largest relative difference to the model's own norm, by number format; in bfloat16 they must agree to the bit."""


class _RMSNorm(torch.autograd.Function):
    """Zhang and Sennrich 2019, arXiv:1910.07467: y = x / sqrt(mean(x²) + ε) · w, computed in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, wide_product: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        unit = x.to(wide, copy=True)
        scale = torch.linalg.vecdot(unit, unit).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
        unit.mul_(scale)
        ctx.save_for_backward(x, weight, scale)
        return unit.mul_(weight).to(x.dtype) if wide_product else unit.to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        unit = x.to(wide, copy=True).mul_(scale)
        slope = grad.to(wide, copy=True).mul_(weight)
        along = torch.linalg.vecdot(slope, unit).unsqueeze(-1).div_(-x.shape[-1])
        return slope.addcmul_(unit, along).mul_(scale).to(x.dtype), None, None, None


class LeanRMSNorm(nn.Module):
    """An RMSNorm with a frozen weight.

    Args:
        weight: [width], the model's own parameter.
        eps: added to the mean square.
        offset: the factor is offset + weight (1 in Gemma).
        wide_product: the weight is multiplied in before rounding to the input's format (Gemma, gpt-oss), not after.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: float, wide_product: bool) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.offset, self.wide_product = weight, eps, offset, wide_product
        self._origin: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width] → [..., width]."""
        weight = self.weight
        if self.wide_product:
            weight = weight.to(torch.promote_types(hidden_states.dtype, torch.float32))
        if self.offset:
            weight = weight + self.offset
        if torch.compiler.is_compiling():  # it fuses by itself what it is shown
            return self._written_out(hidden_states, weight)
        return _RMSNorm.apply(hidden_states, weight, self.variance_epsilon, self.wide_product)  # type: ignore[return-value]

    def origin(self) -> nn.Module:
        """The model's own norm, with the same weight."""
        (norm,) = self._origin
        norm.weight = self.weight
        return norm

    def _written_out(self, x: Tensor, weight: Tensor) -> Tensor:
        unit = x.to(torch.promote_types(x.dtype, torch.float32))
        unit = unit * torch.rsqrt(unit.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (unit * weight).to(x.dtype) if self.wide_product else unit.to(x.dtype) * weight.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def replace_norms(model: nn.Module) -> int:
    """Put LeanRMSNorm in the place of every RMSNorm that it reproduces; returns how many.

    Only frozen ones, of a class whose name says RMSNorm; every class is tried once.
    """
    forms: dict[type, tuple[float, bool] | None] = {}
    replaced = 0
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            kind = type(norm)
            if isinstance(norm, LeanRMSNorm) or not kind.__name__.endswith("RMSNorm") or not _plain(norm):
                continue
            if kind not in forms:
                forms[kind] = _form(norm)
            if (form := forms[kind]) is not None:
                lean = LeanRMSNorm(norm.weight, _eps(norm), *form)  # type: ignore[arg-type]
                lean._origin = (norm,)
                setattr(parent, name, lean.train(norm.training))
                replaced += 1
    return replaced


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0) or 0.0)


def _plain(norm: nn.Module) -> bool:
    parameters = dict(norm.named_parameters())
    return (
        set(parameters) == {"weight"}
        and parameters["weight"].dim() == 1
        and not parameters["weight"].requires_grad
        and not parameters["weight"].is_meta
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and _eps(norm) > 0
    )


@torch.no_grad()
def _form(norm: Any) -> tuple[float, bool] | None:
    """(offset, wide product) with which ours gives the same as `norm`; None if none does."""
    generator = torch.Generator().manual_seed(0)
    width = len(norm.weight)
    x, weight = (torch.randn(n, width, generator=generator) for n in (8, 1))
    found = [(offset, wide) for offset in (0.0, 1.0) for wide in (False, True)]
    for dtype, allowed in _ROUNDING.items():
        theirs = copy.deepcopy(norm).to("cpu", dtype)
        theirs.weight.data = weight[0].to(dtype)
        given = x.to(dtype)
        try:
            wanted = theirs(given)
        except Exception:  # whatever a foreign module may ask for
            return None
        for form in list(found):
            got = LeanRMSNorm(theirs.weight, _eps(norm), *form)(given)
            if got.shape != wanted.shape or float((got - wanted).abs().max()) > allowed * float(wanted.abs().max()):
                found.remove(form)
    return found[0] if found else None
