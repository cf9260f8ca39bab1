"""Safetensors files read and written piece by piece: no more than a part of one tensor is ever in memory.

The format (github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header, which gives
each tensor's type, shape and place, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tunery.errors import ModelError

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
"""Types that are read as numbers; tensors of others are copied as they are."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK = 1 << 24
"""Bytes copied at a time."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        kind: its type, as the format calls it ("BF16").
        start: of its first byte, from the beginning of the file.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype; None if it is not read as numbers."""
        return DTYPES.get(self.kind)

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its rows (elements, if it has one dimension)."""
        assert self.dtype is not None
        start, stop, _ = (rows or slice(None)).indices(self.shape[0] if self.shape else 1)
        inner = self.shape[1:]
        width = math.prod(inner) * self.dtype.itemsize
        with open(self.file, "rb") as file:
            file.seek(self.start + start * width)
            data = bytearray(max(stop - start, 0) * width)
            whole = file.readinto(data) == len(data)
        if not whole:
            raise ModelError(f"{self.file} is shorter than its header says", "copy or download the model again")
        if not data:
            return torch.empty((stop - start, *inner), dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view((stop - start, *inner) if self.shape else ())

    def bytes(self) -> Iterator[bytes]:
        """The tensor's bytes as they are, in pieces."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                piece = file.read(min(CHUNK, left))
                if not piece:
                    raise ModelError(f"{self.file} is shorter than its header says", "copy or download the model again")
                left -= len(piece)
                yield piece


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and the file's metadata.

    Raises:
        ModelError: it is damaged.
    """
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header: dict[str, Any] = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", {})
        found = {
            name: Stored(
                file,
                facts["dtype"],
                tuple(facts["shape"]),
                8 + length + facts["data_offsets"][0],
                facts["data_offsets"][1] - facts["data_offsets"][0],
            )
            for name, facts in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise ModelError(f"{file} is damaged: {error}", "copy or download the model again") from error
    return dict(sorted(found.items(), key=lambda item: item[1].start)), dict(metadata)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its type as the format calls it, its shape, and its bytes in pieces."""

    kind: str
    shape: tuple[int, ...]
    size: int
    pieces: Iterable[bytes | memoryview]


def write_file(file: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> None:
    """Write a file, drawing each tensor's pieces when its turn comes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.kind,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for name, tensor in tensors.items():
            _write_pieces(handle, name, tensor)


def _write_pieces(handle: BinaryIO, name: str, tensor: Planned) -> None:
    written = 0
    for piece in tensor.pieces:
        handle.write(piece)
        written += memoryview(piece).nbytes
    if written != tensor.size:
        raise AssertionError(f"{name}: {written} bytes instead of {tensor.size}")


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in the order of its elements."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
