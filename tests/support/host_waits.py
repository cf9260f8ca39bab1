"""On a GPU, an operation whose result Python needs (a number, a shape) makes the host wait for all that was queued.
Under `NoHostWaits` there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_UNTAGGED = (torch.ops.aten.item, torch.ops.aten.is_nonzero)
"""Seen as such in inference mode only; elsewhere they are made of `_local_scalar_dense`."""


class NoHostWaits(TorchDispatchMode):
    """Reading a number (`item`, `bool`, `equal`) and operations whose output's shape depends on the data (`nonzero`,
    indexing by a mask) raise AssertionError. PyTorch's own tags say which operations those are."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        waits = any(tag in func.tags for tag in _WAITING) or func.overloadpacket in _UNTAGGED
        if func is torch.ops.aten.index.Tensor:
            waits = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
