"""The gated feed-forward block, down(act(gate(x)) · up(x)), as one step of automatic differentiation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunery.fast.fused_linear import FusedLoRALinear
from tunery.fast.fused_lora import gated_mlp
from tunery.fast.islands import ACTIVATIONS
from tunery.fast.replacement import Replacement, replace_modules
from tunery.lora.layer import LoRALinear

_LAYERS = ("gate_proj", "up_proj", "down_proj")
_PARTS = (*_LAYERS, "act_fn")


class FusedMLP(Replacement):
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

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → [..., width]."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        fused = [layer for layer in layers if isinstance(layer, FusedLoRALinear) and not layer._forward_hooks]
        if len(fused) == len(layers):
            gate, up, down = (layer.part(x) for layer in fused)
            if gate is not None and up is not None and down is not None:
                return gated_mlp(x, gate, up, down, self.activation)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def is_gated_mlp(block: nn.Module) -> bool:
    """Whether a module has the layers of a gated feed-forward block, and no others."""
    return set(dict(block.named_children())) == {*_PARTS}


def replace_mlps(model: nn.Module) -> int:
    """Put FusedMLP in the place of every gated feed-forward block that it reproduces to the bit; returns how many.

    That is tried on random numbers with the block's own weights, once for each class and activation.
    """
    forms: dict[tuple[type, type], str | None] = {}

    def fused(block: nn.Module) -> FusedMLP | None:
        if isinstance(block, FusedMLP) or not is_gated_mlp(block):
            return None
        gate, up, down, act_fn = (block.get_submodule(name) for name in _PARTS)
        kind = (type(block), type(act_fn))
        if kind not in forms:
            forms[kind] = _activation(block)
        if (activation := forms[kind]) is None:
            return None
        return FusedMLP(gate, up, down, act_fn, activation).in_place_of(block)

    return replace_modules(model, fused)


@torch.no_grad()
def _activation(block: nn.Module) -> str | None:
    """The name under which the block's activation is known, if the block does what FusedMLP does; else None."""
    gate, up, down, act_fn = (block.get_submodule(name) for name in _PARTS)
    if not isinstance(gate, LoRALinear | nn.Linear) or gate.weight.is_meta:
        return None
    if not all(isinstance(layer, LoRALinear | nn.Linear) for layer in (up, down)):
        return None
    generator = torch.Generator().manual_seed(0)
    weight = gate.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(8, gate.in_features, generator=generator).to(weight.device, dtype)
    opened = 4 * torch.randn(256, generator=generator).to(weight.device, dtype)
    for name, (act, _) in ACTIVATIONS.items():
        allowed = 4 * torch.finfo(dtype).eps
        if not torch.allclose(act(opened), act_fn(opened), rtol=allowed, atol=allowed):
            continue
        try:
            same = torch.equal(FusedMLP(gate, up, down, act_fn, name)(x), block(x))
        except Exception:  # whatever a foreign block may ask for
            return None
        return name if same else None
    return None
