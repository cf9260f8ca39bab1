"""LoRALinear as one step of automatic differentiation, together with the layers that are given the same input.

`fuse_lora` makes every LoRALinear of a model a FusedLoRALinear, and `unfuse_lora` makes it plain again. A layer stays
the object that it is, whatever holds it (its parents, hooks, state dicts): only its class changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunery.fast.fused_lora import LoRAPart, lora_linears, once_a_step
from tunery.fast.shared_input import SharedInput, by_input, watch_inputs
from tunery.lora.layer import LoRALinear
from tunery.models.quantized import is_quantized, unpacking

FUSES_QUANTIZED = {"cuda"}
"""Devices on which layers with a quantised base take the fused functions."""


class FusedLoRALinear(LoRALinear):
    """A LoRALinear that gives the same with less work, where it can.

    Attributes:
        shared: layers that are given the same input, this one among them, where that has been found out.
    """

    shared: SharedInput | None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the dtype of the base's output."""
        if (part := self.part(x)) is None:
            return super().forward(x)
        together = self.shared.outputs(self, x) if self.shared is not None else None
        return lora_linears(x, [part])[0] if together is None else together

    def part(self, x: Tensor) -> LoRAPart | None:
        """This layer for the fused functions (tunery.fast.fused_lora); None where only the plain path gives the right
        result: without an adapter, with dropout, under autocast, with a variant that does more than add, and with a
        base that is trained or does more than multiply."""
        if (name := self.active) is None or self.dropouts[name].on(self.training):
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        return once_a_step((self, name, x.dtype), lambda: self._part(name, x.dtype))

    def _part(self, name: str, dtype: torch.dtype) -> LoRAPart | None:
        if not self.variant(name).additive or (weight := self._frozen_weight(dtype)) is None:
            return None
        bias = self.bias if self.bias is None or self.bias.dtype == dtype else self.bias.to(dtype)
        return LoRAPart(weight, bias, self.lora_A[name], self.lora_B[name], self.settings[name].scaling)

    def _frozen_weight(self, dtype: torch.dtype) -> Tensor | Callable[[], Tensor] | None:
        """The base's weight [out, in] in `dtype`, or a function that unpacks it, if the base does nothing else."""
        base = self.base
        if is_quantized(base):
            # On a CPU bitsandbytes takes a way of its own to the product, and what PEFT computes must be what we do.
            return unpacking(base, dtype) if base.weight.device.type in FUSES_QUANTIZED else None
        if type(base) not in (nn.Linear, Conv1D) or base._forward_hooks or base._forward_pre_hooks:
            return None
        weight: Tensor = base.weight  # type: ignore[assignment]
        if weight.requires_grad or weight.dtype != dtype:
            return None
        return weight.t() if isinstance(base, Conv1D) else weight


def fuse_lora(model: nn.Module) -> None:
    """Make every LoRALinear of a model a FusedLoRALinear."""
    for layer in model.modules():
        if type(layer) is LoRALinear:
            layer.__class__ = FusedLoRALinear
            layer.shared = None  # type: ignore[assignment]


def unfuse_lora(model: nn.Module) -> None:
    """Undo `fuse_lora`."""
    for layer in model.modules():
        if type(layer) is FusedLoRALinear:
            del layer.shared
            layer.__class__ = LoRALinear  # type: ignore[assignment]


def find_shared_inputs(model: nn.Module, run: Callable[[], object]) -> None:
    """Watch `run`, one forward pass of the model, and let layers of one block that are given one tensor compute
    together."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}
    groups = by_input(watch_inputs(layers, run))
    for layer in layers.values():
        layer.shared = None
    for names in groups:
        if len(names) > 1 and len(set(names)) == len(names):
            together = SharedInput([layers[name] for name in names])
            for name in names:
                layers[name].shared = together
