"""The layers of a served model: the base's own products, and beside them whatever adapters a step's tokens ask for.

Layers that are given the same input (query, key and value; gate and up) compute together, as in training
(tunery.lora.shared), and plain ones share one weight matrix, of which theirs become views: one large product instead of
several small ones. Which layers those are is found out by watching one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunery.lora.attach import swap_modules
from tunery.lora.layer import can_wrap
from tunery.lora.targets import plain_modules
from tunery.models.quantized import is_quantized


@dataclass(frozen=True)
class Low:
    """The adapters of a step in one group of layers, side by side.

    Attributes:
        A: [R, in]: of the first layer all adapters' A, then of the second, …; for an embedding [vocabulary, R].
        Bs: for each layer [out, its part of R], scaled; None where no adapter reaches this layer.
        bounds: for each layer its part of R, as (start, stop).
        mask: bool [T, R], true where a column belongs to another adapter than the token; None where there are none.
    """

    A: Tensor
    Bs: tuple[Tensor | None, ...]
    bounds: tuple[tuple[int, int], ...]
    mask: Tensor | None


class Source(Protocol):
    """Who knows which adapters this step's tokens ask for."""

    def low(self, group: Group) -> Low | None:
        """The adapters beside these layers; None where there are none."""
        ...


@dataclass(frozen=True)
class Site:
    """One layer that can carry adapters.

    Attributes:
        name: the full name of the module.
        dtype: in which its adapters compute.
    """

    name: str
    module: nn.Module
    dtype: torch.dtype


class Group:
    """Layers with the same input. The first that is called computes all.

    Args:
        sites: more than one only if they are of one width and are given one tensor.
        source: see Source.
        head: whether this is the output head, which sees only the positions that are asked for.
    """

    def __init__(self, sites: Sequence[Site], source: Source, head: bool = False):
        self.sites, self.head, self._source = tuple(sites), head, source
        self.embedding = isinstance(sites[0].module, nn.Embedding)
        self._fused = _fuse([site.module for site in sites]) if len(sites) > 1 else None
        self._given: Tensor | None = None
        self._ready: list[Tensor | None] = []

    def output(self, index: int, x: Tensor) -> Tensor:
        """The output of layer number `index` for x [..., in] (ids [...] for an embedding)."""
        if len(self.sites) == 1:
            return self._compute(x)[0]
        if self._given is not x or self._ready[index] is None:
            self._given, self._ready = x, list(self._compute(x))
        y = self._ready[index]
        self._ready[index] = None
        if all(part is None for part in self._ready):
            self._given = None
        assert y is not None
        return y

    def forget(self) -> None:
        """Let go of outputs that nobody took (a step that failed)."""
        self._given, self._ready = None, []

    def _compute(self, x: Tensor) -> Sequence[Tensor]:
        low = self._source.low(self)
        if self._fused is not None:
            weight, bias, sizes = self._fused
            outs: Sequence[Tensor] = F.linear(x, weight, bias).split(sizes, dim=-1)
        else:
            outs = [site.module(x) for site in self.sites]
        if low is not None:
            self._add(outs, x, low)
        return outs

    def _add(self, outs: Sequence[Tensor], x: Tensor, low: Low) -> None:
        """Add the adapters' B A x, for each token its own adapter's alone."""
        if self.embedding:
            h = F.embedding(x.flatten(), low.A)
        else:
            h = F.linear(x.flatten(0, -2).to(low.A.dtype), low.A)
        if low.mask is not None:
            h.masked_fill_(low.mask, 0.0)
        for y, B, (start, stop) in zip(outs, low.Bs, low.bounds, strict=True):
            if B is not None:
                y.view(-1, y.shape[-1]).addmm_(h[:, start:stop].to(y.dtype), B.to(y.dtype).t())


_Fused = tuple[Tensor, Tensor | None, list[int]]


@torch.no_grad()
def _fuse(modules: Sequence[nn.Module]) -> _Fused | None:
    """One weight [sum of out, in] of plain linear layers, whose own become views of it; None where they differ in kind.

    The numbers and the memory they take stay the same.
    """
    if not all(type(module) is nn.Linear and not module._forward_hooks for module in modules):
        return None
    layers: list[Any] = list(modules)
    kinds = {(layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in layers}
    if len(kinds) > 1 or not layers[0].weight.is_floating_point() or len(set(layers)) < len(layers):
        return None
    sizes = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    for layer, rows in zip(layers, weight.split(sizes), strict=True):
        layer.weight = nn.Parameter(rows, requires_grad=False)
    if bias is not None:
        for layer, part in zip(layers, bias.split(sizes), strict=True):
            layer.bias = nn.Parameter(part, requires_grad=False)
    return weight, bias, sizes


class ServedLayer(nn.Module):
    """Stands in the place of a linear layer, a Conv1D or an embedding.

    Attributes:
        base: the model's own layer.
    """

    def __init__(self, group: Group, index: int):
        super().__init__()
        self.base = group.sites[index].module
        self._group, self._index = group, index

    def forward(self, x: Tensor) -> Tensor:
        """As the base's, with the step's adapters."""
        return self._group.output(self._index, x)

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its layer besides (`weight`, `num_embeddings`, …) is the base's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


@dataclass(frozen=True)
class Watched:
    """How a layer was called in one forward pass: by the identity of its input, and the number of tokens."""

    given: list[int]
    tokens: list[int]


def watch(model: nn.Module, run: Callable[[], Any]) -> dict[str, Watched]:
    """What every layer that can carry an adapter is given in `run`, one forward pass; by full name."""
    seen: dict[str, Watched] = {}
    kept = []  # inputs stay alive, so that no two share an identity

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            kept.append(x)
            seen[name].given.append(id(x))
            seen[name].tokens.append(x.numel() if isinstance(module, nn.Embedding) else x.numel() // x.shape[-1])

        return note

    hooks = []
    for name, module in plain_modules(model):
        if can_wrap(module):
            seen[name] = Watched([], [])
            hooks.append(module.register_forward_pre_hook(hook(name)))
    try:
        run()
    finally:
        for each in hooks:
            each.remove()
    return seen


def serve_layers(model: Any, seen: dict[str, Watched], tokens: int, source: Source) -> list[Group]:
    """Put ServedLayers in the place of the layers that see all tokens in order.

    Left alone are layers through which only some of the tokens pass, such as the experts of a mixture.

    Args:
        seen: of a pass over this number of tokens.
    """
    head = model.get_output_embeddings()
    modules = dict(plain_modules(model))
    together: dict[tuple[Any, ...], list[Site]] = {}
    for name, calls in seen.items():
        if len(calls.given) != 1 or calls.tokens != [tokens]:
            continue
        module = modules[name]
        site = Site(name, module, _compute_dtype(module, model.dtype))
        alone = isinstance(module, nn.Embedding | Conv1D) or module is head
        name_of_group = (name,) if alone else (name.rpartition(".")[0], calls.given[0], site.dtype)
        together.setdefault(name_of_group, []).append(site)
    groups = [Group(sites, source, sites[0].module is head) for sites in together.values()]
    layers = {site.module: ServedLayer(group, i) for group in groups for i, site in enumerate(group.sites)}
    swap_modules(model, layers)
    return groups


def _compute_dtype(module: Any, default: torch.dtype) -> torch.dtype:
    return default if is_quantized(module) or not module.weight.is_floating_point() else module.weight.dtype
