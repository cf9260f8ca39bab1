"""The dtypes of GGUF files: which tensor gets which, and turning numbers into them.

The `gguf` library quantises to q8_0, q5_1, q5_0, q4_1 and q4_0. The k-quants (q6_k, q4_k_m, …) are made by llama.cpp's
own function, which the package xllamacpp carries: ggml_quantize_chunk of its public header ggml.h.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from tunery.errors import ConfigError

_FLOATS = (Type.F32, Type.F16, Type.BF16)

_BY_LIBRARY = (*_FLOATS, Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0)
"""What the `gguf` library writes itself."""

_SMALLER_BLOCKS = {Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""k-quants take 256 numbers at a time; a tensor whose rows are not a multiple of that gets one that takes 32."""

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class Numbers:
    """A dtype of a whole file.

    Attributes:
        usual: of most weight matrices.
        output: of the matrix that gives the logits, which matters most.
        better: of some matrices in the layers, by their name and place; None for those that get the usual one.
    """

    name: str
    file_type: LlamaFileType
    usual: Type
    output: Type
    better: Callable[[str, int, int], Type | None] = lambda name, layer, layers: None

    @property
    def needs_llama_cpp(self) -> bool:
        """Whether llama.cpp's own function is needed to make it."""
        return self.usual not in _BY_LIBRARY

    def type_of(self, name: str, shape: tuple[int, ...], layers: int, output: str) -> Type:
        """The type of one tensor.

        Args:
            name: in the file.
            layers: of the model.
            output: name of the tensor that gives the logits.
        """
        if len(shape) < 2 or name.endswith("_norm.weight") or name == "position_embd.weight":
            return Type.F32
        match = _LAYER.fullmatch(name)
        better = self.better(match[2], int(match[1]), layers) if match else None
        return _fitting(self.output if name == output else better or self.usual, shape[-1])


def _fitting(wanted: Type, width: int) -> Type:
    """The type, or the one to take where rows of that width do not divide into its blocks."""
    for candidate in (wanted, _SMALLER_BLOCKS.get(wanted, Type.F16)):
        if candidate in _FLOATS or width % gguf.GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Type.F16


def _spread(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between: errors there are carried furthest."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2


def _medium(fused: Type, spread: Type, rest: Type | None = None) -> Callable[[str, int, int], Type | None]:
    """llama.cpp's "M" mixtures: values and the projection out of the feed-forward part get more bits in some layers."""

    def better(name: str, layer: int, layers: int) -> Type | None:
        if name == "attn_qkv":
            return fused
        if name in ("attn_v", "ffn_down"):
            return spread if _spread(layer, layers) else rest
        return None

    return better


NUMBERS: dict[str, Numbers] = {
    numbers.name: numbers
    for numbers in (
        Numbers("f32", LlamaFileType.ALL_F32, Type.F32, Type.F32),
        Numbers("f16", LlamaFileType.MOSTLY_F16, Type.F16, Type.F16),
        Numbers("bf16", LlamaFileType.MOSTLY_BF16, Type.BF16, Type.BF16),
        Numbers("q8_0", LlamaFileType.MOSTLY_Q8_0, Type.Q8_0, Type.Q8_0),
        Numbers("q6_k", LlamaFileType.MOSTLY_Q6_K, Type.Q6_K, Type.Q6_K),
        Numbers(
            "q5_k_m", LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K, Type.Q6_K, _medium(fused=Type.Q6_K, spread=Type.Q6_K)
        ),
        Numbers("q5_1", LlamaFileType.MOSTLY_Q5_1, Type.Q5_1, Type.Q8_0),
        Numbers("q5_0", LlamaFileType.MOSTLY_Q5_0, Type.Q5_0, Type.Q8_0),
        Numbers(
            "q4_k_m", LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K, Type.Q6_K, _medium(fused=Type.Q5_K, spread=Type.Q6_K)
        ),
        Numbers("q4_1", LlamaFileType.MOSTLY_Q4_1, Type.Q4_1, Type.Q8_0),
        Numbers("q4_0", LlamaFileType.MOSTLY_Q4_0, Type.Q4_0, Type.Q8_0),
        Numbers(
            "q3_k_m",
            LlamaFileType.MOSTLY_Q3_K_M,
            Type.Q3_K,
            Type.Q6_K,
            _medium(fused=Type.Q4_K, spread=Type.Q5_K, rest=Type.Q4_K),
        ),
    )
}
"""Number formats of an exported file, best first."""


def numbers_of(name: str) -> Numbers:
    """A dtype by its name.

    Raises:
        ConfigError: there is none of that name, or nothing here can make it.
    """
    by_library = [n for n, numbers in NUMBERS.items() if not numbers.needs_llama_cpp]
    found = NUMBERS.get(name.lower())
    if found is None:
        raise ConfigError(
            f"no dtype {name!r} can be written here",
            f"by the gguf library: {', '.join(by_library)}; by llama.cpp itself: "
            f"{', '.join(n for n in NUMBERS if n not in by_library)}",
        )
    if found.needs_llama_cpp and _ggml_quantize() is None:
        raise ConfigError(
            f"{name} is made by llama.cpp's own function, which the installed xllamacpp does not show",
            f"the gguf library can write {', '.join(by_library)}; or export as f16 and use llama.cpp's llama-quantize",
        )
    return found


def bytes_of(shape: tuple[int, ...], kind: Type) -> int:
    """Size of a tensor in the file."""
    return math.prod(gguf.quants.quant_shape_to_byte_shape(shape, kind))


def encode(numbers: np.ndarray, kind: Type) -> np.ndarray:
    """float32 [rows, width] (or [n]) in a type of GGUF, as bytes [rows, …]."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    if kind in _BY_LIBRARY:
        return gguf.quants.quantize(numbers, kind).view(np.uint8)
    return _by_llama_cpp(numbers, kind)


def _by_llama_cpp(numbers: np.ndarray, kind: Type) -> np.ndarray:
    quantize = _ggml_quantize()
    assert quantize is not None
    rows, width = numbers.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((rows, width // block * size), dtype=np.uint8)

    def part(start: int, stop: int) -> None:
        source = numbers[start:stop].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        quantize(int(kind), source, out[start:stop].ctypes.data, 0, stop - start, width, None)

    workers = os.cpu_count() or 1
    step = max(1, -(-rows // (4 * workers)))
    with ThreadPoolExecutor(workers) as pool:  # ctypes lets go of the interpreter's lock
        list(pool.map(lambda start: part(start, min(start + step, rows)), range(0, rows, step)))
    return out


@functools.cache
def _ggml_quantize() -> Callable[..., int] | None:
    """size_t ggml_quantize_chunk(type, const float * from, void * to, first number, rows, width, importance or NULL)"""
    spec = importlib.util.find_spec("xllamacpp")
    folders = spec.submodule_search_locations if spec else None
    for file in (file for folder in folders or () for file in sorted(Path(folder).glob("xllamacpp*.so"))):
        try:
            function = ctypes.CDLL(str(file)).ggml_quantize_chunk
        except (OSError, AttributeError):
            continue
        function.restype = ctypes.c_size_t
        function.argtypes = [
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_float),
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        return function
    return None
