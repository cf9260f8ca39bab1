"""Products with a fixed weight, the weight laid out once as a processor reads it fastest.

PyTorch lays a weight out anew for every product on a CPU. A few tokens at a time, that takes as long as the product
itself (measured: 1.3 to 1.7 times the time, in bfloat16 and float32). The operators that torch.compile emits for CPUs
(oneDNN's; oneapi-src.github.io/oneDNN, "memory format propagation") take a weight that was laid out before. They are no
documented interface, so they are used only where they are there and give the product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tunery.lora.variants.lora import add_up_

ROWS = 16
"""Number of rows for which the layout is chosen; it serves others as well."""

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Largest difference to the plain product, relative to the largest output, in the dtypes that are packed."""

Product = Callable[[Tensor], Tensor]
"""x [T, in] → x W^T + b [T, out]."""

Sum = Callable[[Tensor, Tensor], Tensor]
"""y [T, out], h [T, R] → y + h B^T; y may be changed."""


def plain(weight: Tensor, bias: Tensor | None) -> Product:
    """The product with W [out, in] as PyTorch computes it."""
    return lambda x: F.linear(x, weight, bias)


def plain_sum(B: Tensor) -> Sum:
    """The sum with B [out, R] as PyTorch computes it."""
    return lambda y, h: add_up_(y, h, B.t())


@torch.no_grad()
def packed(weight: Tensor, bias: Tensor | None) -> Product | None:
    """The product with a copy of W [out, in] that is laid out for the processor; None where that cannot be done."""
    if not can_pack(weight.device, weight.dtype):
        return None
    multiply, laid_out = torch.ops.mkldnn._linear_pointwise, _lay_out(weight)
    return lambda x: multiply(x, laid_out, bias, "none", [], "")


@torch.no_grad()
def packed_sum(B: Tensor) -> Sum | None:
    """The sum with a copy of B [out, R] that is laid out for the processor; None where that cannot be done."""
    if not can_pack(B.device, B.dtype):
        return None
    multiply, laid_out = torch.ops.mkldnn._linear_pointwise.binary, _lay_out(B)
    return lambda y, h: multiply(h, y, laid_out, None, "add")


def _lay_out(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operators are there for this device and dtype, and give what PyTorch's own do."""
    if device.type != "cpu" or dtype not in TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    return _agree(dtype)


@functools.cache
def _agree(dtype: torch.dtype) -> bool:
    """Tried once on random numbers."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((48, 40), (48,)))
    try:
        laid_out, operator = _lay_out(weight), torch.ops.mkldnn._linear_pointwise
        for rows in (1, 5, 100):
            x, y = (torch.randn(rows, size, generator=generator).to(dtype) for size in (40, 48))
            wanted = F.linear(x, weight, bias)
            for got, right in (
                (operator(x, laid_out, bias, "none", [], ""), wanted),
                (operator.binary(x, y, laid_out, None, "add"), torch.addmm(y, x, weight.t())),
            ):
                if not bool((got - right).abs().max() <= TOLERANCE[dtype] * right.abs().max()):
                    return False
        return True
    except (AttributeError, RuntimeError, TypeError):
        return False
