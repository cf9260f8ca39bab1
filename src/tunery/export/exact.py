"""A model that holds its weights as they are stored and computes in float32.

Two models are compared by what their weights say, not by how a product in 16 bits happens to be rounded: in bfloat16
an answer's log-probability moves with the order of a sum. Widening the whole model would take twice its memory, so
every layer's weight is widened when its turn comes, a large one part by part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunery.lora.layer import LoRAEmbedding, can_wrap
from tunery.models.quantized import is_quantized

WIDE = torch.float32

PART = 1 << 23
"""Weights widened at a time."""


@contextlib.contextmanager
def compute_in_float32(model: nn.Module) -> Iterator[None]:
    """Within this context every layer of a model takes and gives float32, whatever its weights are stored in. For
    evaluation only; afterwards the model is as it was."""
    with contextlib.ExitStack() as undo:
        for module in list(model.modules()):
            _widen_module(module, undo)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) in (nn.Linear, Conv1D) and _has_narrow(child):
                    _set(parent, name, _WideLinear(child), undo)
        for layer in model.modules():
            if isinstance(layer, LoRAEmbedding):
                scale = float(getattr(layer.base, "scalar_embed_scale", layer.output_scale))
                _set(layer, "output_scale", scale, undo)
        yield


def _widen_module(module: nn.Module, undo: contextlib.ExitStack) -> None:
    """What a single layer needs, but for those that a _WideLinear replaces."""
    if is_quantized(module):
        _set(module, "compute_dtype", WIDE, undo)
        return
    if isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale"):
        _set(module, "embed_scale", _exact_scale(module), undo)
    if not _has_narrow(module) or type(module) in (nn.Linear, Conv1D):
        return
    rows = isinstance(module, nn.Embedding) and can_wrap(module)  # its input is what is looked up
    before = (
        module.register_forward_pre_hook(_widen_rows, with_kwargs=True)
        if rows
        else module.register_forward_pre_hook(_widen)
    )
    undo.callback(before.remove)
    undo.callback(module.register_forward_hook(_restore).remove)


def _set(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set an attribute, and have it set back."""
    if hasattr(owner, name):
        undo.callback(setattr, owner, name, getattr(owner, name))
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _has_narrow(module: nn.Module) -> bool:
    return any(_narrow(p) for p in module.parameters(recurse=False))


def _narrow(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dtype != WIDE


def _exact_scale(module: Any) -> Tensor:
    """Some bases multiply an embedding's rows by a number, which their own format has rounded."""
    return torch.tensor(module.scalar_embed_scale, dtype=WIDE, device=module.weight.device)


class _WideLinear(nn.Module):
    """y = W x + b in float32, W [out, in] (or [in, out], GPT-2's Conv1D) widened part by part."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.flipped = isinstance(layer, Conv1D)
        self.training = layer.training

    @property
    def weight(self) -> Any:
        """The layer's own."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The layer's own."""
        return self.layer.bias

    @property
    def in_features(self) -> int:
        """Numbers that go in."""
        return self.weight.shape[0 if self.flipped else 1]

    @property
    def out_features(self) -> int:
        """Numbers that come out."""
        return self.weight.shape[1 if self.flipped else 0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        weight: Tensor = self.weight.detach()
        if self.flipped:
            weight = weight.t()
        step = max(1, PART // weight.shape[1])
        parts = [F.linear(x.to(WIDE), part.to(WIDE)) for part in weight.split(step)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias.detach().to(WIDE)


def _widen(module: nn.Module, _: Any) -> None:
    stored = {name: p.data for name, p in module.named_parameters(recurse=False)}
    module.__dict__["_stored"] = stored
    for name, parameter in module.named_parameters(recurse=False):
        if _narrow(parameter):
            parameter.data = stored[name].to(WIDE)


def _widen_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of an embedding's table only the rows that are looked up; the ids become places among them."""
    ids = args[0] if args else kwargs["input"]
    used, places = torch.unique(ids, return_inverse=True)
    module.__dict__["_stored"] = {"weight": module.weight.data}
    module.__dict__["_padding"] = module.padding_idx
    module.padding_idx = None
    module.weight.data = module.weight.data[used].to(WIDE)
    return (places.view(ids.shape),), {}


def _restore(module: Any, _: Any, output: Any) -> None:
    stored = module.__dict__.pop("_stored")
    for name, parameter in module.named_parameters(recurse=False):
        parameter.data = stored[name]
    if "_padding" in module.__dict__:
        module.padding_idx = module.__dict__.pop("_padding")
