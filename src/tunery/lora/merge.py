"""Merging an adapter into a copy of its base."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from tunery.errors import AdapterError
from tunery.lora.attach import active_adapter, lora_layers, require_adapter
from tunery.lora.layer import LoRALayer
from tunery.models.quantized import compute_dtype, is_quantized, plain_layer, quantized_layers, unpacked_weight
from tunery.models.typed import text_config, tied_weights, unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunery.models.quantized import QuantizedLayer

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def merge(model: Model, name: str | None = None) -> Model:
    """A new, plain model in which each adapted W has the adapter in it: W + s · B A, or what the variant makes of it.

    The model given is not changed. Wrappers around it or parts of it (torch.compile, DataParallel) are not in the copy.

    The sum is taken in float32 (float64 for a float64 base) and rounded once to the base's dtype. When one of
    two tied weights (embedding and head) is adapted, the copy has them apart and its configuration says so. The copy of
    a base in 4 or 8 bits (tunery.models.quantized) is a plain model of the unpacked weights, which are those that the
    adapter was trained on.

    Args:
        model: a model with adapters. Memory: one copy of it, without adapters.
        name: the adapter to merge; left out, the active one. Other adapters are not in the copy.

    Raises:
        AdapterError: no such adapter, none is active, or the base's weights are packed in a way not known here.
    """
    name = active_adapter(model) if name is None else name
    if name is None:
        raise AdapterError("there is no active adapter to merge", "name one, or put one on with load_adapter")
    require_adapter(model, name)
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    memo: dict[int, object] = {}
    untied = False
    # What deepcopy finds in its memo it takes as already copied: each wrapper becomes its plain, merged layer.
    for path, layer in lora_layers(model).items():
        adapted = name in layer.settings
        tied = uses[id(layer.weight)] > 1
        memo[id(layer)] = _plain_layer(layer, name if adapted else None, path, tied, memo)
        untied = untied or (adapted and tied)
    for _, module in quantized_layers(model):
        if id(module) not in memo:  # no wrapper stands around it
            memo[id(module)] = _unpacked_layer(module)
    for wrapper in reversed([module for module in model.modules() if unwrapped(module) is not module]):
        memo[id(wrapper)] = copy.deepcopy(unwrapped(wrapper), memo)
    merged = copy.deepcopy(model, memo)
    if quantizer := getattr(merged, "hf_quantizer", None):
        quantizer.remove_quantization_config(merged)
    if untied:
        _untie(cast("PreTrainedModel", merged))
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return merged


def _plain_layer(layer: LoRALayer, name: str | None, path: str, tied: bool, memo: dict[int, object]) -> nn.Module:
    """A copy of the wrapped layer. Its weight is merged; a tied weight's other uses keep the base's."""
    if is_quantized(layer.base):
        plain = memo[id(layer.base)] = _unpacked_layer(layer.base, layer if name else None, name)
        return plain
    if name is None:
        return copy.deepcopy(layer.base, memo)
    weight = nn.Parameter(_merged_weight(layer, name, path))
    if not tied:
        memo[id(layer.weight)] = weight
        return copy.deepcopy(layer.base, memo)
    plain = copy.deepcopy(layer.base, memo)
    plain.weight = weight
    return plain


def _unpacked_layer(module: QuantizedLayer, layer: LoRALayer | None = None, name: str | None = None) -> nn.Module:
    """The plain layer of a quantised one, with the adapter `name` of its wrapper in its weight."""
    weight = unpacked_weight(module)
    merged = weight if layer is None or name is None else layer.merged(name, weight)
    return plain_layer(module, merged.to(compute_dtype(module)))


def _merged_weight(layer: LoRALayer, name: str, path: str) -> Tensor:
    weight = layer.weight
    if not weight.is_floating_point() or weight.numel() != layer.in_features * layer.out_features:
        raise AdapterError(
            f"{path} is quantised ({weight.dtype}), so an adapter cannot be added to its weight",
            "load the base unquantised, load the adapter on it, and merge there",
        )
    return layer.merged(name, weight).to(weight.dtype)


def _untie(model: PreTrainedModel) -> None:
    for config in {id(c): c for c in (model.config, text_config(model.config))}.values():
        config.tie_word_embeddings = False
    # transformers notes at construction which names share a weight, and goes by it when saving
    model.all_tied_weights_keys = tied_weights(model)
