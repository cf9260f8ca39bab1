"""The base with the adapter in it, as a folder that any program that reads safetensors can load.

Dtype, names of tensors and split into files are the base's. One slice of one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunery.export.safetensors_io import NAMES, Planned, as_bytes, write_file
from tunery.export.subject import Subject
from tunery.export.weights import FileWeights, MergedWeights
from tunery.paths import read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

LARGEST_FILE = 5_000_000_000
"""Bytes in a file, where the base's own files give no split (it is quantised)."""

_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "license*", "notice*")
"""Files that must travel with a copy of the weights."""


def write_merged(subject: Subject, folder: Path) -> None:
    """Write the merged model with configuration, tokenizer and chat template into an empty folder."""
    weights = subject.weights
    files = _layout(weights)
    for name, tensors in files.items():
        _write(weights, folder / name, tensors)
    if len(files) > 1 or SINGLE not in files:
        _write_index(weights, folder / INDEX, files)
    _write_config(subject, folder)
    subject.tokenizer.save_pretrained(folder)
    _copy_beside(subject.source.folder, folder)


def _layout(weights: MergedWeights) -> dict[str, list[str]]:
    """File → the tensors in it: as the base has them, a head that is no longer tied beside its embedding."""
    base = weights.base
    if not isinstance(base, FileWeights):
        return _split(weights)
    files = {}
    for file, names in base.files.items():
        files[file.name] = list(names)
    extra = [name for name in weights.names() if name not in base.stored]
    for name in extra:
        tensors = next(tensors for tensors in files.values() if weights.origin(name) in tensors)
        tensors.insert(tensors.index(weights.origin(name)) + 1, name)
    return files


def _split(weights: MergedWeights) -> dict[str, list[str]]:
    parts: list[list[str]] = [[]]
    size = 0
    for name in weights.names():
        more = _bytes(weights, name)
        if parts[-1] and size + more > LARGEST_FILE:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += more
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def _bytes(weights: MergedWeights, name: str) -> int:
    base = weights.base
    if isinstance(base, FileWeights):
        return base.stored[weights.origin(name)].size
    dtype = weights.dtype(name)
    assert dtype is not None
    return math.prod(weights.shape(name)) * dtype.itemsize


def _write(weights: MergedWeights, file: Path, names: list[str]) -> None:
    base = weights.base
    metadata: Mapping[str, str] = {"format": "pt"}
    if isinstance(base, FileWeights):
        metadata = next((m for f, m in base.metadata.items() if f.name == file.name), metadata) or metadata
    write_file(file, {_key(weights, name): _planned(weights, name) for name in names}, metadata)


def _key(weights: MergedWeights, name: str) -> str:
    """The name of a tensor in the file: the base's own, which may leave out the first part."""
    base = weights.base
    return base.keys.get(name, name) if isinstance(base, FileWeights) else name


def _planned(weights: MergedWeights, name: str) -> Planned:
    base, origin = weights.base, weights.origin(name)
    if isinstance(base, FileWeights) and name not in weights.deltas:
        stored = base.stored[origin]
        return Planned(stored.kind, stored.shape, stored.size, stored.bytes())
    dtype = weights.dtype(name)
    assert dtype is not None
    return Planned(NAMES[dtype], weights.shape(name), _bytes(weights, name), _rounded(weights, name))


def _rounded(weights: MergedWeights, name: str) -> Iterator[memoryview]:
    dtype = weights.dtype(name)
    assert dtype is not None
    if name not in weights.deltas:
        yield as_bytes(weights.base.read(weights.origin(name)))
        return
    for rows in weights.slices(name):
        yield as_bytes(weights.wide(name, rows).to(dtype))


def _write_index(weights: MergedWeights, file: Path, files: Mapping[str, list[str]]) -> None:
    total = sum(_bytes(weights, name) for names in files.values() for name in names)
    places = {_key(weights, name): part for part, names in files.items() for name in names}
    write_json(file, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _write_config(subject: Subject, folder: Path) -> None:
    """The base's own configuration, with what the merge changed."""
    config: dict[str, Any] = read_json(subject.source.folder / "config.json")
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)  # where somebody's copy lay
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and subject.weights.untied:
            part["tie_word_embeddings"] = False
    if subject.quantized:
        config["dtype"] = subject.numbers
        config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_beside(base: Path, folder: Path) -> None:
    files = [base / "generation_config.json", *(file for pattern in _LEGAL for file in base.glob(pattern))]
    for file in files:
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
