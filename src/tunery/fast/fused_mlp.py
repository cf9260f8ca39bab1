"""The gated feed-forward block, down(act(gate(x)) · up(x)), as one step of automatic differentiation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunery.fast.fused_linear import FusedLoRALinear
from tunery.fast.fused_lora import gated_mlp
from tunery.fast.islands import ACTIVATIONS
from tunery.lora.layer import LoRALinear

_LAYERS = ("gate_proj", "up_proj", "down_proj")


class FusedMLP(nn.Module):
    """A gated feed-forward block around the layers of a model's own, under the same names.

    Where an adapter is active in all three the whole block is one fused function (gated_mlp); in any other case the
    layers run one by one.

    Attributes:
        activation: of ACTIVATIONS.
    """

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, act_fn: nn.Module, activation: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act_fn
        self.activation = activation
        self._origin: tuple[Any, ...] = ()  # in a tuple, so that it is no submodule

    def origin(self) -> nn.Module:
        """The model's own block, around the layers that are here now."""
        (block,) = self._origin
        for name in _LAYERS:
            setattr(block, name, getattr(self, name))
        return block

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → [..., width]."""
        layers: tuple[Any, ...] = (self.gate_proj, self.up_proj, self.down_proj)
        if all(isinstance(layer, FusedLoRALinear) and not layer._forward_hooks for layer in layers):
            gate, up, down = (layer.part(x) for layer in layers)
            if gate is not None and up is not None and down is not None:
                return gated_mlp(x, gate, up, down, self.activation)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def is_gated_mlp(block: nn.Module) -> bool:
    """Whether a module has the layers of a gated feed-forward block, and no others."""
    return set(dict(block.named_children())) == {*_LAYERS, "act_fn"}


def replace_mlps(model: nn.Module) -> int:
    """Put FusedMLP in the place of every gated feed-forward block that it reproduces to the bit; returns how many.

    That is tried on random numbers with the block's own weights, once for each class and activation.
    """
    forms: dict[tuple[type, type], str | None] = {}
    replaced = 0
    for parent in list(model.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, FusedMLP) or not is_gated_mlp(block):
                continue
            kind = (type(block), type(block.act_fn))
            if kind not in forms:
                forms[kind] = _activation(block)
            if (activation := forms[kind]) is not None:
                gate, up, down = (getattr(block, layer) for layer in _LAYERS)
                lean = FusedMLP(gate, up, down, block.act_fn, activation)  # type: ignore[arg-type]
                lean._origin = (block,)
                setattr(parent, name, lean.train(block.training))
                replaced += 1
    return replaced


@torch.no_grad()
def _activation(block: Any) -> str | None:
    """The name under which the block's activation is known, if the block does what FusedMLP does; else None."""
    gate, up, down = layers = tuple(getattr(block, layer) for layer in _LAYERS)
    if not all(isinstance(layer, LoRALinear | nn.Linear) for layer in layers) or layers[0].weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = layers[0].weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(8, layers[0].in_features, generator=generator).to(weight.device, dtype)
    opened = 4 * torch.randn(256, generator=generator).to(weight.device, dtype)
    for name, (act, _) in ACTIVATIONS.items():
        allowed = 4 * torch.finfo(dtype).eps
        if not torch.allclose(act(opened), block.act_fn(opened), rtol=allowed, atol=allowed):
            continue
        try:
            same = torch.equal(FusedMLP(gate, up, down, block.act_fn, name)(x), block(x))
        except Exception:  # whatever a foreign block may ask for
            return None
        return name if same else None
    return None
