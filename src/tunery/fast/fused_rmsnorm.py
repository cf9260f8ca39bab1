"""RMSNorm as one step of automatic differentiation, put in the place of a model's own.

transformers writes the norm out in float32, and PyTorch keeps two float32 copies of the input for each. Here only the
input itself and one number per row are kept. A norm is replaced only if ours, on random numbers, gives what it gives.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunery.fast.islands import add_rms_norm, rms_norm, rms_norm_backward
from tunery.fast.replacement import Replacement, replace_modules
from tunery.models.autograd import Context

_ROUNDING = {torch.float32: (1e-6, 1.0), torch.bfloat16: (1e-2, 1e-2)}
"""By dtype: the largest difference to the model's own norm, relative to its largest element, and the largest fraction
of elements that may differ at all. In bfloat16 a sum taken in another order moves one element in ten thousand to the
neighbouring number; the weight multiplied in on the other side of a rounding, one in four."""


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float, wide_product: bool) -> Tensor:
        y, scale = rms_norm(x, weight, eps, wide_product)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        return rms_norm_backward(grad, None, x, weight, scale), None, None, None


class _ResidualRMSNorm(torch.autograd.Function):
    """(x + more, norm(x + more)), or (x, norm(x)): the residual stream goes on beside the norm, and both gradients meet
    in one pass."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, more: Tensor | None, weight: Tensor, eps: float, wide_product: bool
    ) -> tuple[Tensor, Tensor]:
        if more is None:
            y, scale = rms_norm(x, weight, eps, wide_product)
        else:
            x, y, scale = add_rms_norm(x, more, weight, eps, wide_product)
        ctx.save_for_backward(x, weight, scale)
        ctx.set_materialize_grads(False)
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, around: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        dx = around if grad is None else rms_norm_backward(grad, around, x, weight, scale)
        return dx, dx if ctx.needs_input_grad[1] else None, None, None, None


class FusedRMSNorm(Replacement):
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

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width] → [..., width]."""
        weight = self._factor(hidden_states.dtype)
        return _RMSNorm.apply(hidden_states, weight, self.variance_epsilon, self.wide_product)  # type: ignore[return-value]

    def beside(self, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + more, its norm), each [..., width]; without `more` (x, its norm)."""
        weight = self._factor(x.dtype)
        return _ResidualRMSNorm.apply(x, more, weight, self.variance_epsilon, self.wide_product)  # type: ignore[return-value]

    def _factor(self, dtype: torch.dtype) -> Tensor:
        """What the unit vectors are multiplied by, [width]."""
        weight = self.weight.to(torch.promote_types(dtype, torch.float32)) if self.wide_product else self.weight
        weight = weight + self.offset if self.offset else weight
        return weight if self.wide_product or weight.dtype == dtype else weight.to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def replace_norms(model: nn.Module) -> int:
    """Put FusedRMSNorm in the place of every RMSNorm that it reproduces; returns how many.

    Only frozen ones, of a class whose name says RMSNorm; every class is tried once.
    """
    forms: dict[type, tuple[float, bool] | None] = {}

    def fused(norm: nn.Module) -> FusedRMSNorm | None:
        kind = type(norm)
        if isinstance(norm, FusedRMSNorm) or not kind.__name__.endswith("RMSNorm") or not _plain(norm):
            return None
        if kind not in forms:
            forms[kind] = _form(norm)
        if (form := forms[kind]) is None:
            return None
        return FusedRMSNorm(norm.get_parameter("weight"), _eps(norm), *form).in_place_of(norm)

    return replace_modules(model, fused)


def _eps(norm: nn.Module) -> float:
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
def _form(norm: nn.Module) -> tuple[float, bool] | None:
    """(offset, wide product) with which ours gives the same as `norm`; None if none does."""
    generator = torch.Generator().manual_seed(0)
    width = len(norm.get_parameter("weight"))
    x, weight = (torch.randn(n, width, generator=generator) for n in (8, 1))
    found = [(offset, wide) for offset in (0.0, 1.0) for wide in (False, True)]
    for dtype, (allowed, fraction) in _ROUNDING.items():
        theirs = copy.deepcopy(norm).to("cpu", dtype)
        factor = theirs.get_parameter("weight")
        factor.data = weight[0].to(dtype)
        given = x.to(dtype)
        try:
            wanted = theirs(given)
        except Exception:  # whatever a foreign module may ask for
            return None
        for form in list(found):
            got = FusedRMSNorm(factor, _eps(norm), *form)(given)
            if got.shape != wanted.shape:
                found.remove(form)
                continue
            worst = float((got - wanted).abs().max()) / float(wanted.abs().max())
            if worst > allowed or float((got != wanted).float().mean()) > fraction:
                found.remove(form)
    return found[0] if found else None
