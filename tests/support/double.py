"""Models compute norms and rotary angles in float32 even when their weights are float64. Under `Double` they do not, so
that equalities can be tested to 1e-9."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Double(TorchFunctionMode):
    """Every request for float32 becomes one for float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args)
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})
