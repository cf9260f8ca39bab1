"""Functions of PyTorch, transformers and safetensors that have no types of their own, or not whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch.utils.checkpoint
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

checkpoint: Callable[..., Any] = torch.utils.checkpoint.checkpoint

load_file: Callable[[Path], dict[str, Tensor]] = safetensors.torch.load_file


WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Under which wrappers keep the module that they stand around: torch.compile, data parallelism, sharding, activation
checkpointing."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers that PyTorch puts around one (torch.compile, DataParallel, …), or itself."""
    while (key := _wrapper_key(module)) is not None:
        inside = module.get_submodule(key)
        if inside is module:
            break
        module = inside
    return module


def _wrapper_key(module: nn.Module) -> str | None:
    children: dict[str, nn.Module | None] = vars(module)["_modules"]
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return next((key for key in WRAPPERS if key.startswith("_") and children.get(key) is not None), None)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a model once, the model itself too, by its full name.

    Wrappers (`unwrapped`) are passed over, and are no part of a name.
    """
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        module = unwrapped(module)
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        children: dict[str, nn.Module | None] = vars(module)["_modules"]
        inside = [(f"{name}.{key}" if name else key, child) for key, child in children.items() if child is not None]
        waiting += reversed(inside)


def numbers(tensor: Tensor) -> list[float]:
    """Those in a tensor [n], after one wait for the device."""
    return tensor.tolist()


def norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    """The Euclidean norm of all numbers, or along a dimension."""
    return tensor.norm(dim=dim)


def hook_state_dict(module: nn.Module, saved: Callable[..., None], loading: Callable[..., None]) -> None:
    """Have a module call `saved` on a state dict that it has filled, and `loading` on one that it is about to read."""
    module.register_state_dict_post_hook(saved)
    module.register_load_state_dict_pre_hook(loading)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a model's configuration that is about text; of a model of text alone, all of it."""
    return config.get_text_config()


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The output head, if a model has one."""
    return model.get_output_embeddings()


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Which names share a weight: each name and the one that it repeats."""
    return model.get_expanded_tied_weights_keys(all_submodels=True)
