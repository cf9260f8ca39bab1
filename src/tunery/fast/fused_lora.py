"""Linear layers with LoRA as one step of automatic differentiation.

For layers i that share their input x (query, key and value; gate and up), with frozen W_i and trained A_i, B_i:

    y_i = W_i x + b_i + s_i B_i A_i x

Written out operation by operation, PyTorch keeps the intermediates of each and launches many small kernels. Here the
A_i are stacked into one product, x is kept once, updates are added in place (`addmm_`), and of the intermediates only
A x ([T, rank], thin) is kept. The sums are those of the plain path (tunery.lora.variants.lora) in another order. The
idea of writing the backward pass by hand, and of keeping only x and the adapters, is Unsloth's and LoRAFusion's
(Zhu et al. 2025, arXiv:2510.00206); the code is ours.

Within `one_step()` the adapters' copies in the model's dtype are made once, not for each micro-batch, and gradients add
up in stacked float32 buffers, which become the parameters' `grad` at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunery.fast.islands import gated, gated_backward
from tunery.lora.variants.lora import add_up_
from tunery.models.autograd import Context

ALIGNED = 8
"""Ranks are padded with zeros to a multiple of this on a GPU, whose products are slow on rows that do not start at a
multiple of 16 bytes."""


@dataclass(frozen=True, slots=True)
class LoRAPart:
    """One layer: W [out, in] (a view is fine), its bias or None, A [rank, in], B [out, rank] and the scaling s.

    A quantised layer gives a function instead of W, which unpacks it for one product.
    """

    weight: Tensor | Callable[[], Tensor]
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float

    def dense(self) -> Tensor:
        """W [out, in]."""
        return self.weight if isinstance(self.weight, Tensor) else self.weight()


def lora_linears(x: Tensor, parts: Sequence[LoRAPart]) -> tuple[Tensor, ...]:
    """Outputs of layers that share their input.

    Args:
        x: [..., in], in the dtype of the weights.

    Returns:
        One [..., out] for each part, in that format.
    """
    stack, adapters = _stack(x, parts)
    return _LoRALinears.apply(x, stack, *adapters)  # type: ignore[return-value]


def gated_mlp(x: Tensor, gate: LoRAPart, up: LoRAPart, down: LoRAPart, activation: str) -> Tensor:
    """down(act(gate(x)) · up(x)), the feed-forward block of Llama and its kin (Shazeer 2020, arXiv:2002.05202).

    Kept for the backward pass: x, gate(x) and up(x); their product is computed again there.

    Args:
        x: [..., width].
        activation: of tunery.fast.islands.ACTIVATIONS.

    Returns:
        [..., width].
    """
    (first, adapters), (last, more) = _stack(x, (gate, up)), _stack(x, (down,))
    return _GatedMLP.apply(x, first, last, activation, *adapters, *more)  # type: ignore[return-value]


# --------------------------------------------------------------------------- adapters with one input, side by side


class Stack:
    """The adapters of layers that share their input, in the model's dtype, and their gradients.

    Args:
        parts: of the layers, as they are now.
        together: gradients stay here until `one_step` ends; otherwise the backward pass hands them to autograd.

    Attributes:
        A: [R, in], the A_i one below another; Bs: B_i [out, rank]. Ranks may be padded with zeros.
        ranks: of the Bs.
        scaling: s where it is the same for all; else 1, and each is multiplied in on its own.
        trained: whether any of the adapters wants a gradient.
        dA, dBs: sums of gradients without s, [R, in] and [rank, out] each (on a CPU that is the quicker way round).
    """

    def __init__(self, parts: Sequence[LoRAPart], dtype: torch.dtype, together: bool) -> None:
        As, Bs = [part.A.detach() for part in parts], [part.B.detach() for part in parts]
        if _wants_alignment(As[0].device) and any(len(A) % ALIGNED for A in As):
            missing = [-len(A) % ALIGNED for A in As]
            As = [F.pad(A, (0, 0, 0, n)) for A, n in zip(As, missing, strict=True)]
            Bs = [F.pad(B, (0, n)) for B, n in zip(Bs, missing, strict=True)]
        scalings = {part.scaling for part in parts}
        self.parts, self.together = parts, together
        wide = As[0] if len(As) == 1 else torch.cat(As)
        self.A = wide.to(dtype)
        self.Bs = [B.to(dtype) for B in Bs]
        self.ranks = [len(A) for A in As]
        self.scaling = scalings.pop() if len(scalings) == 1 else 1.0
        self.trained = any(part.A.requires_grad or part.B.requires_grad for part in parts)
        self.dA: Tensor | None = None
        self.dBs: list[Tensor | None] = [None] * len(parts)
        self._turned = self.A.t(), [B.t() for B in self.Bs]
        self._wide, self._scaled = wide, None if self.scaling != 1.0 else self.A

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(y_i, A x) for x [T, in]."""
        A, Bs = self._turned
        h = torch.mm(x, A)
        outs = []
        for part, B, thin in zip(self.parts, Bs, self._split(h), strict=True):
            weight = part.dense().t()
            y = torch.mm(x, weight) if part.bias is None else torch.addmm(part.bias, x, weight)
            outs.append(add_up_(y, thin, B, part.scaling))
        return outs, h

    def through_B(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradient of A x, [T, R], but for `scaling`."""
        thin = [torch.mm(g, B) for g, B in zip(grads, self.Bs, strict=True)]
        if len(thin) == 1:
            return thin[0]
        for each, part in zip(thin, self.parts, strict=True):
            if part.scaling != self.scaling:
                each.mul_(part.scaling / self.scaling)
        return torch.cat(thin, dim=1)

    def input_gradient(self, grads: Sequence[Tensor], thin: Tensor) -> Tensor:
        """∂/∂x [T, in]: through every W_i and, by way of `thin`, through the stacked A."""
        dx = torch.mm(grads[0], self.parts[0].dense())
        for g, part in zip(grads[1:], self.parts[1:], strict=True):
            dx.addmm_(g, part.dense())
        # Scaled once per step, and not by `alpha`: in half precision not every processor's product is quick with one.
        if self._scaled is None:
            self._scaled = (self._wide * self.scaling).to(thin.dtype)
        return dx.addmm_(thin, self._scaled)

    def add_gradients(self, x: Tensor, h: Tensor, grads: Sequence[Tensor], thin: Tensor) -> None:
        """Add one micro-batch to dA and dBs."""
        wide = self.parts[0].A.dtype
        self.dA = _added(self.dA, thin.t(), x, wide)
        for i, (g, h_i) in enumerate(zip(grads, self._split(h), strict=True)):
            self.dBs[i] = _added(self.dBs[i], h_i.t(), g, wide)

    def take_gradients(self) -> list[Tensor]:
        """∂/∂A_1, ∂/∂B_1, ∂/∂A_2, …, contiguous, in the adapters' own dtype; nothing is left here."""
        dA, dBs, found, at = self.dA, self.dBs, [], 0
        if dA is None:
            return []
        if self.scaling != 1.0:
            dA.mul_(self.scaling)
        for part, dB, rank in zip(self.parts, dBs, self.ranks, strict=True):
            assert dB is not None
            found.append(dA[at : at + len(part.A)])
            found.append(torch.mul(dB[: len(part.A)].t(), part.scaling, out=torch.empty_like(part.B)))
            at += rank
        self.dA, self.dBs = None, [None] * len(dBs)
        return found

    def _split(self, h: Tensor) -> Sequence[Tensor]:
        return (h,) if len(self.ranks) == 1 else h.split(self.ranks, dim=1)


def _added(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """total + left right; a new tensor if there is no total yet."""
    if total is None:
        return torch.mm(left, right).to(wide)
    return total.addmm_(left, right) if right.dtype == wide else total.add_(torch.mm(left, right))


def _wants_alignment(device: torch.device) -> bool:
    return device.type == "cuda"


# --------------------------------------------------------------------------- one optimizer step


_step: dict[tuple[object, ...], tuple[Stack, list[Tensor]]] | None = None
"""Of the step that is open, by what they hold: stacks, and the tensors that autograd has to know of. Not by thread: a
GPU's backward pass recomputes layers in one of its own."""


_remembered: dict[Hashable, LoRAPart | None] = {}


@contextlib.contextmanager
def one_step() -> Iterator[None]:
    """Within this context adapters do not change, and gradients of the fused functions are not handed to autograd but
    added to the parameters' `grad` when it ends without an error. Backward passes belong inside."""
    global _step
    if _step is not None:
        yield
        return
    _step = {}
    try:
        yield
        for stack, _ in _step.values():
            _add_to_parameters(stack)
    finally:
        _step = None
        _remembered.clear()


def once_a_step(key: Hashable, make: Callable[[], LoRAPart | None]) -> LoRAPart | None:
    """The part that `make` returns; within a step it is asked once for each key."""
    if _step is None:
        return make()
    if key not in _remembered:
        _remembered[key] = make()
    return _remembered[key]


def _add_to_parameters(stack: Stack) -> None:
    for parameter, gradient in zip(_adapters(stack.parts), stack.take_gradients(), strict=False):
        if parameter.requires_grad:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _adapters(parts: Sequence[LoRAPart]) -> list[Tensor]:
    return [tensor for part in parts for tensor in (part.A, part.B)]


def _stack(x: Tensor, parts: Sequence[LoRAPart]) -> tuple[Stack, list[Tensor]]:
    """The adapters of the parts in the dtype of x, and the tensors that autograd has to know of: where gradients stay
    in the stack, one is enough to make it come by."""
    if _step is None:
        return Stack(parts, x.dtype, together=False), _adapters(parts)
    key = (x.dtype, *[id(part.A) for part in parts])
    if (found := _step.get(key)) is None:
        trained = [tensor for tensor in _adapters(parts) if tensor.requires_grad]
        found = _step[key] = Stack(parts, x.dtype, together=True), trained[:1]
    return found


# --------------------------------------------------------------------------- autograd


def _complete(grads: Sequence[Tensor | None], stack: Stack, x: Tensor) -> list[Tensor]:
    """The gradients [T, out] of all outputs: zeros for outputs that nothing was computed from."""
    return [
        x.new_zeros(len(x), len(B)) if g is None else g.reshape(len(x), len(B))
        for g, B in zip(grads, stack.Bs, strict=True)
    ]


class _LinearsContext(Context, Protocol):
    stack: Stack
    adapters: int
    shape: torch.Size


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _LinearsContext, x: Tensor, stack: Stack, *adapters: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        outs, h = stack.forward(rows)
        ctx.save_for_backward(rows, h)
        ctx.stack, ctx.adapters, ctx.shape = stack, len(adapters), x.shape
        ctx.set_materialize_grads(False)
        return tuple(y.view(*x.shape[:-1], -1) for y in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: _LinearsContext, *given: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, h), stack = ctx.saved_tensors, ctx.stack
        grads = _complete(given, stack, x)
        thin = stack.through_B(grads)
        dx = stack.input_gradient(grads, thin).view(ctx.shape) if ctx.needs_input_grad[0] else None
        if not stack.trained:
            return (dx, None, *[None] * ctx.adapters)
        stack.add_gradients(x, h, grads, thin)
        return (dx, None, *([None] * ctx.adapters if stack.together else stack.take_gradients()))


class _GatedContext(Context, Protocol):
    first: Stack
    last: Stack
    activation: str
    adapters: int
    shape: torch.Size


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GatedContext, x: Tensor, first: Stack, last: Stack, activation: str, *adapters: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        (gate, up), h = first.forward(rows)
        (y,), h_down = last.forward(gated(gate, up, activation))
        ctx.save_for_backward(rows, h, gate, up, h_down)
        ctx.first, ctx.last, ctx.activation = first, last, activation
        ctx.adapters, ctx.shape = len(adapters), x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GatedContext, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, gate, up, h_down = ctx.saved_tensors
        first, last = ctx.first, ctx.last
        grads = [grad.reshape(len(x), -1)]
        thin = last.through_B(grads)
        product, *inside = gated_backward(last.input_gradient(grads, thin), gate, up, ctx.activation)
        if last.trained:
            last.add_gradients(product, h_down, grads, thin)
        del product
        thin = first.through_B(inside)
        dx = first.input_gradient(inside, thin).view(ctx.shape) if ctx.needs_input_grad[0] else None
        if first.trained:
            first.add_gradients(x, h, inside, thin)
        if first.together or not (first.trained or last.trained):
            return (dx, None, None, None, *[None] * ctx.adapters)
        found = [stack.take_gradients() or [None] * (2 * len(stack.parts)) for stack in (first, last)]
        return (dx, None, None, None, *found[0], *found[1])
