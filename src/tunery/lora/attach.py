"""Putting adapters on a model and taking them off again; choosing the one that is active."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import nn

from tunery.config import VariantName
from tunery.errors import AdapterError, TargetError
from tunery.lora.dropout import Dropout, DropoutClock
from tunery.lora.layer import LoRALayer, LoRASettings, LoRATensors, check_name, wrap
from tunery.lora.targets import find_targets, plain_modules
from tunery.lora.variants import VARIANTS
from tunery.lora.variants.base import Variant
from tunery.models.typed import named_modules


def attach(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    rank_stabilized: bool = False,
    variant: VariantName = "lora",
    seed: int = 0,
    name: str = "default",
    clock: DropoutClock | None = None,
) -> list[str]:
    """Freeze a model and put a fresh adapter on it.

    Args:
        rank: width of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: fraction of the adapter's inputs set to zero while training.
        targets, exclude: see `find_targets`.
        rank_stabilized: scale by alpha / sqrt(rank) instead.
        variant: of LoRA (tunery.lora.variants).
        seed: the adapter's starting values follow from it.
        name: of the adapter; a model may carry several.
        clock: decides the dropout masks, and whether there is dropout at all; None follows the model's training mode.

    Returns:
        The full names of the adapted layers, in model order.

    Raises:
        TargetError: `targets` or `exclude` matches nothing, or what LoRA cannot adapt.
        AdapterError: the model already has an adapter of that name, or a setting is out of range.
    """
    settings = LoRASettings(rank, float(alpha), dropout, rank_stabilized, variant)
    _check(model, name, settings)
    plain = dict(plain_modules(model))
    # Drawn on the CPU in float32, so that every device and dtype starts from the same adapter.
    generator = torch.Generator().manual_seed(seed)
    matched = find_targets(model, targets, exclude)
    _require_adaptable(plain, matched, VARIANTS[variant])
    pieces = {path: LoRATensors(settings, *wrap(plain[path]).initial(rank, generator)) for path in matched}
    place(model, name, pieces, clock=clock)
    return matched


def _require_adaptable(plain: Mapping[str, nn.Module], matched: Sequence[str], variant: Variant) -> None:
    tables = [path for path in matched if isinstance(plain[path], nn.Embedding)]
    if tables and not variant.embeddings:
        raise TargetError(
            f"{variant.title} adapts linear layers, and {tables[0]} is an embedding",
            "leave it out of lora.targets, or set lora.variant: lora",
        )


def _check(model: nn.Module, name: str, settings: LoRASettings) -> None:
    check_name(name)
    if name in adapter_names(model):
        raise AdapterError(
            f"the model already has an adapter named {name!r}", "choose another name, or remove that one first"
        )
    if settings.rank < 1 or settings.alpha <= 0 or not 0 <= settings.dropout < 1:
        raise AdapterError(
            f"no adapter can have rank {settings.rank}, alpha {settings.alpha:g} and dropout {settings.dropout:g}",
            "the rank is at least 1, alpha above 0, dropout from 0 to below 1",
        )


def place(
    model: nn.Module,
    name: str,
    pieces: Mapping[str, LoRATensors],
    *,
    trainable: bool = True,
    clock: DropoutClock | None = None,
) -> None:
    """Freeze the base, put an adapter with known tensors beside the layers named, and make it active.

    Args:
        pieces: by full module name.
        trainable: the adapter's tensors collect gradients. Those of other adapters are left as they are.
    """
    check_name(name)
    plain = dict(plain_modules(model))
    layers = lora_layers(model)
    fresh = {path: wrap(plain[path]) for path in pieces if path not in layers}
    layers.update(fresh)
    swap_modules(model, {plain[path]: layer for path, layer in fresh.items()})
    for number, (path, piece) in enumerate(pieces.items()):
        dropout = Dropout(piece.settings.dropout, clock, number)
        layers[path].add(name, piece, dropout, trainable)
    for parameter in base_parameters(model):
        parameter.requires_grad_(False)
    set_active(model, name)


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever those stand (a layer may be shared by several parents)."""
    for parent in list(model.modules()):
        children: dict[str, nn.Module | None] = vars(parent)["_modules"]  # named_children() gives a module once
        for key, child in list(children.items()):
            if child is not None and child in replacements:
                setattr(parent, key, replacements[child])


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The wrapped layers by full module name, in model order."""
    return {name: module for name, module in named_modules(model) if isinstance(module, LoRALayer)}


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that the model carries, oldest first."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.settings))


def active_adapter(model: nn.Module) -> str | None:
    """The adapter in use, or None."""
    return next((layer.active for layer in lora_layers(model).values() if layer.active is not None), None)


def base_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model or a part of it that belong to no adapter."""
    layers = lora_layers(module).values()
    own = {id(p) for layer in layers for p in layer.adapter_parameters()}
    return [p for p in module.parameters() if id(p) not in own]


def require_adapter(model: nn.Module, name: str) -> None:
    """Make sure that the model carries an adapter of this name.

    Raises:
        AdapterError: it does not.
    """
    known = adapter_names(model)
    if name not in known:
        raise AdapterError(
            f"the model has no adapter named {name!r}",
            f"it has {', '.join(known)}" if known else "put one on with apply_lora or load_adapter",
        )


def set_active(model: nn.Module, name: str | None) -> None:
    """Use this adapter from now on, in every layer that holds it; None leaves the base alone.

    Raises:
        AdapterError: there is no such adapter.
    """
    if name is not None:
        require_adapter(model, name)
    for layer in lora_layers(model).values():
        layer.active = name if name in layer.settings else None


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Generator[None]:
    """Within this context another adapter is active; with None the model is its base, bit for bit.

    Raises:
        AdapterError: there is no such adapter.
    """
    before = {layer: layer.active for layer in lora_layers(model).values()}
    if name is not None and not any(name in layer.settings for layer in before):
        require_adapter(model, name)
    for layer in before:
        layer.active = name if name in layer.settings else None
    try:
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


def disabled(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within this context the model is its base, bit for bit."""
    return using(model, None)


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """An adapter's tensors under the names of PEFT's files ("base_model.model.<module>.lora_A.weight"), in model order.

    These are the tensors themselves: training moves them.

    Raises:
        AdapterError: there is no such adapter.
    """
    require_adapter(model, name)
    return {
        f"base_model.model.{path}.{key}": tensor
        for path, layer in lora_layers(model).items()
        if name in layer.settings
        for key, tensor in layer.tensors(name).items()
    }


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should be given: the active adapter's tensors that collect gradients."""
    name = active_adapter(model)
    return [] if name is None else [p for p in adapter_state(model, name).values() if p.requires_grad]


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter off. Where a layer holds no other, the original module takes its place again (still frozen).

    Raises:
        AdapterError: there is no such adapter.
    """
    require_adapter(model, name)
    bare: dict[nn.Module, nn.Module] = {}
    for layer in lora_layers(model).values():
        layer.discard(name)
        if not layer.settings:
            bare[layer] = layer.base
    swap_modules(model, bare)
