"""The layers of a served model: the base's own products, and beside them whatever adapters a step's tokens ask for.

Layers that are given the same input (query, key and value; gate and up) compute together, as in training
(tunery.fast.shared_input): one product with their weights one below the other instead of several small ones. On a CPU
the weights are laid out for the processor (tunery.inference.packed).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunery.fast.shared_input import LayerCall, SharedOutputs, by_input, watch_inputs
from tunery.inference.packed import Product, Sum, packed, plain
from tunery.lora.attach import swap_modules
from tunery.lora.layer import can_wrap
from tunery.lora.targets import plain_modules
from tunery.lora.variants.lora import add_up_
from tunery.models.quantized import is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WASTED = 1 << 23
"""Products with the zeros of B that are still cheaper than several small products for the layers one by one."""


@dataclass(frozen=True)
class LoRAStack:
    """The adapters of a step in one group of layers, side by side.

    Attributes:
        down: x → A x [T, R], A being of the first layer all adapters' A, then of the second, …
        up: y, h → y + B h, B [sum of out, R] being zero but where a layer's rows meet its own columns.
        B: the same, scaled.
        columns: for each of the R columns the number of its adapter.
        blocks: for each layer that an adapter reaches its rows and columns of B.
        zeros: of B outside the blocks.
    """

    down: Product
    up: Sum
    B: Tensor
    columns: tuple[int, ...]
    blocks: tuple[tuple[slice, slice], ...]
    zeros: int


class StackSource(Protocol):
    """Who knows which adapters this step's tokens ask for."""

    def low(self, group: LayerGroup) -> tuple[LoRAStack, Tensor | None] | None:
        """The adapters beside these layers, and bool [T, R], true where a column belongs to another adapter than the
        token (None where none does); None where there are no adapters."""
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


class LayerGroup:
    """Layers with the same input. The first that is called computes all.

    Args:
        sites: more than one only if they are of one width and dtype, and are given one tensor.
        source: see StackSource.
        head: whether this is the output head, which sees only the positions that are asked for.
    """

    def __init__(self, sites: Sequence[Site], source: StackSource, head: bool = False):
        self.sites, self.head, self._source = tuple(sites), head, source
        self.embedding = isinstance(sites[0].module, nn.Embedding)
        self.sizes = [_width(site.module) for site in sites]
        self._product = None if self.embedding else _product([site.module for site in sites], keep=head)
        self._outputs: SharedOutputs[int] = SharedOutputs()

    def output(self, index: int, x: Tensor) -> Tensor:
        """The output of layer number `index` for x [..., in] (ids [...] for an embedding)."""
        if len(self.sites) == 1:
            return self._compute(x)
        y = self._outputs.take(index, x, lambda: dict(enumerate(self._compute(x).split(self.sizes, dim=-1))))
        assert y is not None
        return y

    def forget(self) -> None:
        """Let go of outputs that nobody took (a step that failed)."""
        self._outputs.forget()

    def _compute(self, x: Tensor) -> Tensor:
        """The outputs of all layers one after another, [..., sum of out]."""
        if self._product is not None:
            y = self._product(x.view(-1, x.shape[-1]))
            shape = (*x.shape[:-1], y.shape[-1])
        else:
            outs = [site.module(x) for site in self.sites]
            y = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
            shape, y = y.shape, y.view(-1, y.shape[-1])
        if (found := self._source.low(self)) is not None:
            y = self._with_adapters(y, x.view(-1) if self.embedding else x.view(-1, x.shape[-1]), *found)
        return y.view(shape)

    def _with_adapters(self, y: Tensor, x: Tensor, low: LoRAStack, mask: Tensor | None) -> Tensor:
        """y + B A x for every token's own adapter; y [T, sum of out], x [T, in] (ids [T] for an embedding)."""
        h = low.down(x)
        if mask is not None:
            h.masked_fill_(mask, 0.0)
        if low.zeros * len(y) <= WASTED:
            return low.up(y, h)
        for rows, columns in low.blocks:
            add_up_(y[:, rows], h[:, columns], low.B[rows, columns].t())
        return y


def _width(module: nn.Module) -> int:
    """Numbers that a layer gives for a token."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    assert isinstance(module, nn.Linear | Conv1D)
    return module.nf if isinstance(module, Conv1D) else module.out_features


@torch.no_grad()
def _product(modules: Sequence[nn.Module], keep: bool) -> Product | None:
    """One product for plain linear layers with the same input; None where they are not plain, or differ in kind.

    The weights take as much memory as before: the layers' own become views of one, or are given up for one that is laid
    out for the processor.

    Args:
        keep: the layer's own weight stays (the head's, which may be the embedding's too).
    """
    layers = [layer for layer in modules if isinstance(layer, nn.Linear | Conv1D) and not layer._forward_hooks]
    if len(layers) < len(modules) or any(type(layer) not in (nn.Linear, Conv1D) for layer in layers):
        return None
    kinds = {(type(layer), layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in layers}
    if len(kinds) > 1 or not layers[0].weight.is_floating_point() or len(set(layers)) < len(layers):
        return None
    weights = [layer.weight.t() if isinstance(layer, Conv1D) else layer.weight for layer in layers]
    weight = weights[0] if len(layers) == 1 else torch.cat(weights)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    if (product := packed(weight, bias)) is not None:
        if not keep:
            for layer in layers:
                layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        return product
    if len(layers) > 1 and type(layers[0]) is nn.Linear:
        for layer, rows in zip(layers, weight.split([w.shape[0] for w in weights]), strict=True):
            layer.weight = nn.Parameter(rows, requires_grad=False)
    return plain(weight, bias)


class ServedLayer(nn.Module):
    """Stands in the place of a linear layer, a Conv1D or an embedding.

    Attributes:
        base: the model's own layer.
    """

    def __init__(self, group: LayerGroup, index: int):
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


def served_inputs(model: nn.Module, run: Callable[[], object]) -> list[LayerCall]:
    """What every layer that can carry an adapter is given in `run`, one forward pass."""
    return watch_inputs({name: module for name, module in plain_modules(model) if can_wrap(module)}, run)


def serve_layers(
    model: PreTrainedModel, calls: Sequence[LayerCall], tokens: int, source: StackSource
) -> list[LayerGroup]:
    """Put ServedLayers in the place of the layers that see all tokens in order.

    Left alone are layers through which only some of the tokens pass, such as the experts of a mixture.

    Args:
        calls: of a pass over this number of tokens.
    """
    head = model.get_output_embeddings()
    modules = dict(plain_modules(model))
    place = {name: number for number, name in enumerate(modules)}
    times = Counter(call.layer for call in calls)
    whole = [call for call in calls if times[call.layer] == 1 and call.tokens == tokens]
    together: dict[tuple[object, ...], list[Site]] = {}
    for number, names in enumerate(by_input(sorted(whole, key=lambda call: place[call.layer]))):
        for name in names:
            module = modules[name]
            site = Site(name, module, _compute_dtype(module, model.dtype))
            alone = isinstance(module, nn.Embedding | Conv1D) or module is head
            together.setdefault((number, name if alone else site.dtype), []).append(site)
    groups = [LayerGroup(sites, source, sites[0].module is head) for sites in together.values()]
    layers = {site.module: ServedLayer(group, i) for group in groups for i, site in enumerate(group.sites)}
    swap_modules(model, layers)
    return groups


def _compute_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    weight = module.get_parameter("weight")
    return default if is_quantized(module) or not weight.is_floating_point() else weight.dtype
