"""Which layer of a model each tensor of an adapter file belongs to.

PEFT names them "base_model.model.<module>.lora_A.weight". Files from elsewhere carry the names of wrappers that stood
around the model (torch.compile, DataParallel), the name that the adapter had in memory (".default"), the place that the
text model has inside a model that sees pictures too ("language_model"), or no "base_model.model." at all. A tensor is
taken for a layer's if what is left without these parts is the layer's name without them, and only one layer has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tunery.errors import AdapterError
from tunery.lora.layer import can_wrap
from tunery.lora.variants import VARIANTS
from tunery.lora.variants.base import Variant
from tunery.models.typed import WRAPPERS

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""

_PASSED_OVER = {"base_model", "model", "language_model", *WRAPPERS}
"""Parts of a name that say around or inside what the text model stands."""

_EXTRA = "|".join(key for variant in VARIANTS.values() for key in variant.tensors)
_TENSOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])(?:\.(?P<a>[\w-]+))?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.(?P<b>[\w-]+))?"
    rf"|(?P<extra>{_EXTRA or '(?!)'})(?:\.(?P<c>(?!weight$)[\w-]+))?(?:\.weight)?)"
)


@dataclass
class SortedTensors:
    """The tensors of an adapter file, by the layers of a model.

    Attributes:
        layers: module → "A", "B" and the names of a variant's own tensors → tensor.
        renamed: names that are not PEFT's for these layers → the layer they were taken for.
        strangers: names without a place in the model.
    """

    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    renamed: dict[str, str] = field(default_factory=dict[str, str])
    strangers: list[str] = field(default_factory=list[str])

    @property
    def remark(self) -> str | None:
        """What to say about names that are not PEFT's."""
        if not self.renamed:
            return None
        name, layer = next(iter(self.renamed.items()))
        return (
            f"{len(self.renamed)} tensors of the adapter have other names than PEFT gives them; {name}, for one, was "
            f"taken for a part of {layer}"
        )


def sort_tensors(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], variant: Variant, folder: Path
) -> SortedTensors:
    """A, B and the variant's own tensors by module; every tensor of the file belongs to a module of the right kind.

    Args:
        modules: of the model as it is without adapters.
        folder: that the file lies in, for messages.

    Raises:
        AdapterError: a tensor has no place in the model, or one that a layer needs is missing.
    """
    found, paths = SortedTensors(), _Paths(modules)
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        path = paths.find(match["module"]) if match else None
        if match and path is not None and _fits(modules[path], embedding=bool(match["embedding"])):
            part = match["linear"] or match["embedding"] or match["extra"]
            if part in found.layers.setdefault(path, {}):
                raise _two_of_one(folder, path, part)
            found.layers[path][part] = tensor
            named = match["a"] or match["b"] or match["c"]
            if named or match["module"] != PREFIX + path:
                found.renamed[key] = path
        elif not _is_base_copy(key, tensor, paths):
            found.strangers.append(key)
    _require_whole(found, len(tensors), paths, variant, folder)
    return found


def _fits(module: nn.Module, *, embedding: bool) -> bool:
    return can_wrap(module) and isinstance(module, nn.Embedding) is embedding


class _Paths:
    """The full names of a model's modules, found by what files call them."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self._short: dict[str, str | None] = {}
        for path, module in modules.items():
            if can_wrap(module):
                short = _shortened(path)
                self._short[short] = path if short not in self._short else None  # two of that name: neither

    def find(self, said: str) -> str | None:
        exact = said.removeprefix(PREFIX)
        return exact if exact in self.modules else self._short.get(_shortened(said))

    def example(self) -> str | None:
        """A layer's name, to compare with."""
        linear = (path for path, module in self.modules.items() if can_wrap(module) and "." in path)
        return next((path for path in linear if not isinstance(self.modules[path], nn.Embedding)), None)


def _shortened(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _PASSED_OVER)


def _is_base_copy(key: str, tensor: Tensor, paths: _Paths) -> bool:
    """Whether a tensor repeats a weight of the base: PEFT adds the embedding tables to an adapter that targets them."""
    path = paths.find(key.removesuffix(".weight").removesuffix(".base_layer"))
    weight = getattr(paths.modules[path], "weight", None) if path is not None else None
    if weight is None or weight.shape != tensor.shape:
        return False
    if weight.is_meta:  # looked at before any compute: its values are not there to be compared
        return True
    return torch.equal(tensor.to(weight.device, weight.dtype), weight)


def _two_of_one(folder: Path, path: str, part: str) -> AdapterError:
    return AdapterError(
        f"{folder} holds {part} of {path} twice, so it is not one adapter",
        "save the adapter that you want by itself",
    )


def _require_whole(found: SortedTensors, count: int, paths: _Paths, variant: Variant, folder: Path) -> None:
    wanted = {"A", "B", *variant.tensors}
    strangers = [*found.strangers]
    strangers += [f"{path}.{name}" for path, own in found.layers.items() for name in own if name not in wanted]
    if strangers:
        hint = "load it on the base it was trained on"
        if example := paths.example():
            hint += f"; this model's layers are called {example} and so on"
        raise AdapterError(
            f"{folder} does not fit this model: {len(strangers)} of its {count} tensors have no place in it, "
            f"such as {', '.join(strangers[:3])}",
            hint,
        )
    lone = [
        f"{at} (no {', '.join(sorted(wanted - set(own)))})" for at, own in found.layers.items() if wanted - set(own)
    ]
    if lone or not found.layers:
        raise AdapterError(
            f"the adapter in {folder} is incomplete: {', '.join(lone[:3]) or 'it holds no LoRA tensor'}",
            "save or download the adapter again",
        )
