"""Types for functions with a backward pass of their own (torch.autograd.Function)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """What links a call's `forward` with its `backward`: PyTorch's FunctionCtx, which has no types.

    A function that keeps more than tensors has a Context of its own, with those attributes.
    """

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """As they were given to `save_for_backward`."""
        ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """For each argument of `forward` but the context."""
        ...

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for `backward`."""
        ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """These outputs have no gradient."""
        ...

    def set_materialize_grads(self, value: bool) -> None:
        """Whether `backward` is given zeros for outputs that nothing was computed from; otherwise None."""
        ...


def apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    """What such a function makes of its arguments."""
    return function.apply(*arguments)
