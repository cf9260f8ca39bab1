"""The weights of base and adapter together, W + s · B A or what the variant makes of them, a few rows at a time.

The sum is taken in float32 (float64 for a float64 base) and rounded once, by whoever writes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunery.errors import ModelError
from tunery.lora.layer import LoRATensors
from tunery.lora.targets import plain_modules
from tunery.lora.variants import VARIANTS
from tunery.lora.variants.base import Update, Variant
from tunery.lora.variants.lora import delta_weight
from tunery.models.model_source import ModelSource
from tunery.models.quantized import compute_dtype, quantized_layers, unpacked_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLICE = 1 << 22
"""Numbers merged at a time."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types, as safetensors names them, that are read as numbers; tensors of others are copied as they are."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class BaseWeights(Protocol):
    """The tensors of a base model, by the names of its state dict."""

    def names(self) -> list[str]:
        """All of them, in the order in which they are stored."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype; None for a tensor that is not read as numbers."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        ...

    def kind(self, name: str) -> str:
        """The type of a tensor, as safetensors names it."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        ...

    def key(self, name: str) -> str:
        """The name of a tensor in safetensors files."""
        ...

    def files(self) -> dict[str, list[str]]:
        """Names of its safetensors files → the tensors in each, in order; {} if it lies in none."""
        ...

    def metadata(self, file: str) -> Mapping[str, str]:
        """Of a file of that name."""
        ...


class FileWeights:
    """A base in safetensors files, which are mapped into memory: what is read takes no memory of its own.

    A file may name tensors in its own way: some releases leave the first part ("transformer.") out.

    Raises:
        ModelError: a file is damaged.
    """

    def __init__(self, source: ModelSource, model: nn.Module) -> None:
        prefix, known = f"{getattr(model, 'base_model_prefix', '')}.", set(model.state_dict())
        self._files: dict[str, list[str]] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        self._places: dict[str, tuple[safe_open, str]] = {}
        for file in source.weight_files():
            opened = _open(file)
            self._metadata[file.name] = dict(sorted((opened.metadata() or {}).items()))
            for key in opened.offset_keys():
                name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in known), key)
                self._places[name] = opened, key
                self._files.setdefault(file.name, []).append(name)

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        opened, key = self._places[name]
        return tuple(opened.get_slice(key).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        return DTYPES.get(self.kind(name))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        opened, key = self._places[name]
        tensor = opened.get_tensor(key)
        return tensor if rows is None else tensor[rows]

    def kind(self, name: str) -> str:
        opened, key = self._places[name]
        return opened.get_slice(key).get_dtype()

    def size(self, name: str) -> int:
        return self.read(name).nbytes

    def key(self, name: str) -> str:
        return self._places[name][1] if name in self._places else name

    def files(self) -> dict[str, list[str]]:
        return {file: list(names) for file, names in self._files.items()}

    def metadata(self, file: str) -> Mapping[str, str]:
        return self._metadata.get(file) or _METADATA


_METADATA = {"format": "pt"}
"""Of a file whose base says nothing."""


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except PermissionError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}", "check its permissions") from error
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        raise ModelError(
            f"{file} is damaged, or cannot be mapped: {error}", "copy or download the model again"
        ) from error


class ModelWeights:
    """A base in memory whose linear layers are quantised: their weights are those that the products use."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {f"{name}.weight": layer for name, layer in quantized_layers(model)}
        kept = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
        persistent = model.state_dict()
        self.tensors: dict[str, Tensor] = {
            name: tensor for name, tensor in persistent.items() if name in kept and name not in self.layers
        }
        # as they are now: who computes with the model later may widen its products
        self._dtypes = {name: compute_dtype(layer) for name, layer in self.layers.items()}
        self._unpacked: tuple[str, Tensor] | None = None  # the last one: it is read slice by slice
        self._order = [name for name in persistent if name in self.tensors or name in self.layers]

    def names(self) -> list[str]:
        return list(self._order)

    def shape(self, name: str) -> tuple[int, ...]:
        if (layer := self.layers.get(name)) is not None:
            out_in = (layer.out_features, layer.in_features)
            return out_in[::-1] if getattr(layer, "source_cls", nn.Linear) is Conv1D else out_in
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name] if name in self._dtypes else self.tensors[name].dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if (layer := self.layers.get(name)) is not None:
            if self._unpacked is None or self._unpacked[0] != name:
                whole = unpacked_weight(layer).cpu()
                self._unpacked = name, whole.t() if getattr(layer, "source_cls", nn.Linear) is Conv1D else whole
            whole = self._unpacked[1]
        else:
            whole = self.tensors[name].detach().cpu()
        return whole if rows is None else whole[rows]

    def kind(self, name: str) -> str:
        return NAMES[self.dtype(name)]

    def size(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def key(self, name: str) -> str:
        return name

    def files(self) -> dict[str, list[str]]:
        return {}

    def metadata(self, file: str) -> Mapping[str, str]:
        return _METADATA


@dataclass(frozen=True)
class WeightUpdate:
    """What an adapter adds to one weight.

    Attributes:
        flipped: the weight is stored as [in, out] (GPT-2's Conv1D), or is an embedding's table [vocabulary, width].
    """

    piece: LoRATensors
    flipped: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        out, width = self.piece.B.shape[0], self.piece.A.shape[1]
        return (width, out) if self.flipped else (out, width)

    @property
    def variant(self) -> Variant:
        """Of the adapter."""
        return VARIANTS[self.piece.settings.variant]

    def rows(self, rows: slice | None = None) -> Tensor:
        """s · B A in the layout of the weight, float32, or some of its rows."""
        return self.of(self.piece.A, self.piece.B, self.piece.settings.scaling, rows)

    def merged(self, weight: Tensor, rows: slice | None, whole: Callable[[], Tensor]) -> Tensor:
        """Some rows of the weight, with the update in them.

        Args:
            weight: those rows, at least float32.
            whole: reads all of them.
        """
        if self.variant.additive:
            return weight + self.rows(rows)
        piece, part = self.piece, rows or slice(None)
        A, B, scaling = piece.A.float(), piece.B.float(), piece.settings.scaling
        if self.flipped:
            extra = {key: tensor.float() for key, tensor in piece.extra.items()}
            return self.variant.merged(whole().to(weight.dtype).t(), Update(A, B, scaling, extra)).t()[part]
        extra = {key: tensor.float()[part] for key, tensor in piece.extra.items()}
        return self.variant.merged(weight, Update(A, B[part], scaling, extra))

    def of(self, A: Tensor, B: Tensor, scaling: float, rows: slice | None = None) -> Tensor:
        """The same of other numbers for this layer."""
        left, right = B.float(), A.float()
        if self.flipped:
            left, right = right.t(), left.t()
        return delta_weight(right, left[rows or slice(None)], scaling)


class MergedWeights:
    """A base's tensors with an adapter's update in those that it adapts.

    Where one of two tied weights (embedding and head) is adapted, both are here, and `untied` is true.

    Attributes:
        base: the tensors without the update.
        deltas: by the names of the weights they are added to.
        lost: adapted weights that the base's files hold in another form, so that nothing can be merged into them.
    """

    def __init__(self, base: BaseWeights, model: PreTrainedModel, pieces: Mapping[str, LoRATensors]) -> None:
        """
        Args:
            model: the base's layers, with or without memory for their weights.
            pieces: the adapter, by full module name.
        """
        self.base = base
        modules = dict(plain_modules(model))
        self.deltas = {
            f"{path}.weight": WeightUpdate(
                piece, isinstance(modules[path], nn.Embedding | Conv1D) or _was_conv(modules[path])
            )
            for path, piece in pieces.items()
        }
        self.head, self._source = _tied(model)
        self.untied = bool({self.head, self._source} & set(self.deltas))
        self._names = base.names()
        self.lost = lost_weights(base, model, list(pieces))
        if self.untied and self.head and self._source in self._names and self.head not in self._names:
            self._names.insert(self._names.index(self._source) + 1, self.head)

    def names(self) -> list[str]:
        """All tensors, in the order of the base's; a head that is no longer tied follows its embedding."""
        return list(self._names)

    def origin(self, name: str) -> str:
        """The base's tensor that this one is made from."""
        return self._source if self.untied and name == self.head and self._source else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.base.shape(self.origin(name))

    def dtype(self, name: str) -> torch.dtype | None:
        """The base's dtype."""
        return self.base.dtype(self.origin(name))

    def wide(self, name: str, rows: slice | None = None) -> Tensor:
        """The merged tensor, or some of its rows, not yet rounded: float32, or float64 for a float64 base."""
        tensor = self.base.read(self.origin(name), rows)
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if name not in self.deltas:
            return tensor
        return self.deltas[name].merged(tensor, rows, lambda: self.base.read(self.origin(name), None))

    def update(self, name: str, rows: slice | None = None) -> Tensor:
        """What the adapter changes in some rows of a weight that it adapts, at least float32."""
        delta = self.deltas[name]
        if delta.variant.additive:
            return delta.rows(rows)
        base = self.base.read(self.origin(name), rows)
        return self.wide(name, rows) - base.to(torch.promote_types(base.dtype, torch.float32))

    def without_update(self) -> MergedWeights:
        """The base's tensors alone, by the same names."""
        alone = copy.copy(self)
        alone.deltas = {}
        return alone

    def slices(self, name: str) -> Iterator[slice]:
        """Runs of rows that cover the tensor; see `slices_of`."""
        return slices_of(self.shape(name))


def slices_of(shape: tuple[int, ...]) -> Iterator[slice]:
    """Runs of rows of at most SLICE numbers (but at least one row) that cover a tensor of one dimension or more."""
    step = max(1, SLICE // max(math.prod(shape[1:]), 1))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def lost_weights(base: BaseWeights, model: PreTrainedModel, adapted: Sequence[str]) -> list[str]:
    """The weights of adapted layers that a base holds under no such name."""
    names = set(base.names())
    head, source = _tied(model)
    if head and source in names:
        names.add(head)
    return [name for path in adapted if (name := f"{path}.weight") not in names]


def _was_conv(module: nn.Module) -> bool:
    return getattr(module, "source_cls", None) is Conv1D


def _tied(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """The names of head and embedding if they share their weight, else None."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return None, None
    named = {module: name for name, module in plain_modules(model)}
    return f"{named[head]}.weight", f"{named[embedding]}.weight"
