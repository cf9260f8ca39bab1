"""What a notebook needs of tunery.lora, with fused layers: `tunery.apply_lora`, `load_adapter` and `merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from tunery.config import VariantName
from tunery.fast.fused_linear import fuse_lora
from tunery.fast.packed_model import restore_model
from tunery.lora import adapter, attach
from tunery.lora import merge as merging

Model = TypeVar("Model", bound=nn.Module)


def apply_lora(
    model: Model,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    rank_stabilized: bool = False,
    variant: VariantName = "lora",
    seed: int = 0,
    name: str = "default",
) -> Model:
    """Freeze a model and put a fresh adapter on it, to be trained by any loop, Hugging Face's `Trainer` included.

    Args:
        model: a causal language model of transformers.
        rank: width of the update.
        alpha: the update is scaled by alpha / rank; left out, alpha is twice the rank.
        dropout: fraction of the adapter's inputs set to zero in training mode.
        targets, exclude: see `tunery.lora.targets.find_targets`.
        rank_stabilized: scale by alpha / sqrt(rank) instead.
        variant: of LoRA: lora, or another that `lora.variant` knows.
        seed: the adapter's starting values follow from it.
        name: of the adapter; a model may carry several.

    Returns:
        The same model. Only the adapter's tensors are trainable.

    Raises:
        TargetError: `targets` or `exclude` matches nothing, or what LoRA cannot adapt.
        AdapterError: the model already has an adapter of that name.
    """
    attach.attach(
        model,
        rank=rank,
        alpha=2.0 * rank if alpha is None else alpha,
        dropout=dropout,
        targets=targets,
        exclude=exclude,
        rank_stabilized=rank_stabilized,
        variant=variant,
        seed=seed,
        name=name,
    )
    fuse_lora(model)
    return model


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default", trainable: bool = False) -> None:
    """Put an adapter folder on a model and make it active; see `tunery.lora.adapter.load_adapter`.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, as tunery or PEFT writes it. The tensors decide
            which layers are adapted.
        trainable: the adapter's tensors collect gradients, to train on.

    Raises:
        AdapterError: the folder cannot be read, does not fit the model, or is not an adapter that tunery reads; or
            `name` is taken.
    """
    adapter.load_adapter(model, folder, name, trainable)
    fuse_lora(model)


def merge(model: Model, name: str | None = None) -> Model:
    """A new, plain model with an adapter merged into its weights; see `tunery.lora.merge.merge`.

    Args:
        name: the adapter to merge; left out, the active one. Other adapters are not in the copy.

    Raises:
        AdapterError: no such adapter, none is active, or the base's weights are packed in a way not known here.
    """
    merged = merging.merge(model, name)
    restore_model(merged)
    return merged
