"""How much of each layer's update is in an export. Answers may hardly change when one of hundreds of updates is lost,
so each is looked for in the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from tunery.errors import AdapterError
from tunery.export.gguf_file import EMBEDDING, Entry, pair, placed_pieces, stored
from tunery.export.subject import Subject
from tunery.export.weights import MergedWeights, slices_of
from tunery.jsonl import JsonObject

LEAST = 0.5
"""Smallest fraction of an update that must be left."""

SURE = 0.1
"""Spread of the slope, by the size of the rest, above which it says nothing (an update next to nothing)."""

ROUNDING = {
    "float64": 2.0**-23,
    "float32": 2.0**-23,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "f32": 2.0**-23,
    "f16": 2.0**-11,
    "bf16": 2.0**-8,
}
"""Largest relative error of one rounding, by dtype. A weight within it holds all that the format can."""

_SMALLEST = 1e-7
"""Absolute error that is rounding whatever the format (numbers below half precision's normal range)."""


@dataclass(frozen=True)
class Kept:
    """How much of the update is in the export, over all adapted layers.

    For a base weight W, an update D and the exported weight E, the share of the update that is in E is the slope of
    E − W over D: ⟨E − W, D⟩ / ⟨D, D⟩, 1 where it is there and 0 where it is lost. What rounding adds is hardly ever in
    the direction of D, so the slope is sharp even where rounding is larger than the update.

    Attributes:
        layers: looked at.
        measured: those whose slope is sharp.
        mean, least: share of the update, over the measured layers; None if there are none.
        where: the layer with the least.
    """

    layers: int
    measured: int
    mean: float | None
    least: float | None
    where: str | None

    def as_dict(self) -> JsonObject:
        """For export.json."""
        return {
            "layers": self.layers,
            "measured": self.measured,
            "mean_share": self.mean,
            "least_share": self.least,
            "least_in": self.where,
        }


class _Slope:
    """Sums over the parts of one layer."""

    def __init__(self) -> None:
        self.dot = self.size = self.moved = 0.0
        self.count = 0
        self.rounded = True

    def add(self, base: np.ndarray, update: np.ndarray, exported: np.ndarray, rounding: float | None) -> None:
        moved = exported.astype(np.float64) - base
        self.dot += float((moved * update).sum())
        self.size += float((update.astype(np.float64) ** 2).sum())
        self.moved += float((moved**2).sum())
        self.count += update.size
        if rounding is None:
            self.rounded = False
        else:
            wanted = base.astype(np.float64) + update
            error = np.abs(exported - wanted) - 1.01 * rounding * np.abs(wanted)
            self.rounded &= bool((error <= _SMALLEST).all())

    def add_update(self, wanted: Tensor, found: Tensor) -> None:
        """Rows of an update that lies there by itself, without a base."""
        self.add(np.zeros(wanted.shape), wanted.numpy(), found.numpy(), None)

    @property
    def share(self) -> float | None:
        """The slope; None where the update is nothing, or the slope is not sharp."""
        if self.size == 0.0:
            return None
        slope = self.dot / self.size
        rest = max(self.moved - slope * self.dot, 0.0)
        sharp = (rest / self.count / self.size) ** 0.5 < SURE
        return slope if sharp else None


def _kept(slopes: Iterable[tuple[str, _Slope]]) -> Kept:
    shares: dict[str, float] = {}
    number = 0
    for name, slope in slopes:
        number += 1
        share = slope.share
        if share is None:
            continue
        shares[name] = share
        if not slope.rounded and not LEAST <= share <= 2 - LEAST:
            raise AdapterError(f"the update of {name} is not in the export: {round(share, 2) + 0.0:.0%} of it is there")
    if not shares:
        return Kept(number, 0, None, None, None)
    where = min(shares, key=lambda name: shares[name])
    return Kept(number, len(shares), float(np.mean(list(shares.values()))), shares[where], where)


def kept_in_model(weights: MergedWeights, numbers: str, exported: Callable[[str], Tensor]) -> Kept:
    """Of a merged model in memory.

    Args:
        numbers: its dtype.
        exported: a weight by its name.

    Raises:
        AdapterError: a layer's update is lost.
    """

    def slopes() -> Iterable[tuple[str, _Slope]]:
        for name in weights.deltas:
            slope, found = _Slope(), exported(name)
            for rows in weights.slices(name):
                base = weights.base.read(weights.origin(name), rows).float().numpy()
                here = found[rows].detach().float().cpu().numpy()
                slope.add(base, weights.update(name, rows).float().numpy(), here, ROUNDING[numbers])
            yield name, slope

    return _kept(slopes())


def kept_in_gguf(weights: MergedWeights, entries: Iterable[Entry], file: Path, numbers: str) -> Kept:
    """Of a merged model in a GGUF file.

    Raises:
        AdapterError: a layer's update is lost.
    """
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    alone = weights.without_update()

    def slopes() -> Iterable[tuple[str, _Slope]]:
        for entry in entries:
            if entry.source not in weights.deltas:
                continue
            slope, tensor = _Slope(), there[entry.place.name]
            rounding = ROUNDING.get(tensor.tensor_type.name.lower())
            for rows in weights.slices(entry.source) if entry.place.plain else [None]:
                merged, base = stored(weights, entry, rows), stored(alone, entry, rows)
                data = tensor.data if rows is None else tensor.data[rows]
                here = gguf.quants.dequantize(np.ascontiguousarray(data), tensor.tensor_type).reshape(merged.shape)
                slope.add(base, merged - base, here, rounding)
            yield entry.source, slope

    return _kept(slopes())


def kept_in_adapter(subject: Subject, file: Path) -> Kept:
    """Of an adapter in a GGUF file.

    Raises:
        AdapterError: a layer's update is lost, or another one.
    """
    reader = gguf.GGUFReader(file)
    there = {t.name: gguf.quants.dequantize(np.ascontiguousarray(t.data), t.tensor_type) for t in reader.tensors}
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())

    def slopes() -> Iterable[tuple[str, _Slope]]:
        for (place, piece), path in zip(placed_pieces(subject), subject.pieces, strict=True):
            wanted = [torch.from_numpy(t.copy()) for t in pair(place, piece, alpha)]
            found = [torch.from_numpy(there[f"{place.name}.lora_{letter}"].copy()) for letter in "ab"]
            if place.name == EMBEDDING:
                wanted[0], found[0] = wanted[0].t(), found[0].t()
            slope, (A, B) = _Slope(), wanted
            for rows in slices_of((B.shape[0], A.shape[1])):
                slope.add_update(B[rows] @ A, found[1][rows] @ found[0])
            yield path, slope

    return _kept(slopes())


def kept_in_layers(subject: Subject, found: Callable[[str], tuple[Tensor, Tensor, float]]) -> Kept:
    """Of an adapter in memory, in another library.

    Args:
        found: A, B and s of a layer as that library holds them.

    Raises:
        AdapterError: a layer's update is lost, or another one.
    """

    def slopes() -> Iterable[tuple[str, _Slope]]:
        for name, delta in subject.weights.deltas.items():
            slope, parts = _Slope(), found(name.removesuffix(".weight"))
            for rows in slices_of(delta.shape):
                slope.add_update(delta.rows(rows), delta.of(*parts, rows))
            yield name, slope

    return _kept(slopes())
