"""Prompts that begin alike are computed once: keys and values by blocks of 32 tokens, found by what stands before them.

A block's name is a hash of the adapter's key and of all tokens up to the block's end, so a block can only serve a row
that says the same from its first token on, with the same weights. Blocks lie in one pool; the least recently used make
room. The pool's memory is taken once and never grows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from tunery.inference.kv_cache import LayerShape, Slabs, Slot

BLOCK = 32
"""Tokens of a block: what a common prefix is rounded down to."""


def chain(key: str, tokens: Sequence[int], before: Sequence[bytes] = ()) -> list[bytes]:
    """The names of the full blocks of a row.

    Args:
        key: of the adapter.
        before: names of its first blocks, if they are known.
    """
    names = list(before)
    name = names[-1] if names else hashlib.blake2b(key.encode(), digest_size=16).digest()
    for start in range(len(names) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        content = np.asarray(tokens[start : start + BLOCK], np.int64).tobytes()
        name = hashlib.blake2b(name + content, digest_size=16).digest()
        names.append(name)
    return names


class PrefixStore:
    """The pool of blocks.

    Args:
        budget: bytes that it may take; below one block nothing is kept.
    """

    def __init__(self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device, budget: int):
        self._slabs = Slabs(shapes, dtype, device)
        block_bytes = BLOCK * sum(shape.numbers for shape in shapes) * dtype.itemsize
        self.capacity = budget // block_bytes
        self._free: list[int] = []
        self._blocks: OrderedDict[bytes, tuple[int, str]] = OrderedDict()
        """Name → (place in the pool, adapter's key), the least recently used first."""

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    def match(self, names: Sequence[bytes]) -> int:
        """How many of a row's first blocks are here. They count as used now."""
        count = next((i for i, name in enumerate(names) if name not in self._blocks), len(names))
        for name in reversed(names[:count]):  # so that a block never outlives those before it
            self._blocks.move_to_end(name)
        return count

    def copy_to(self, place: Slot, names: Sequence[bytes]) -> None:
        """Copy these blocks, all of which are here, to the front of a row."""
        if not names:
            return
        at = torch.tensor([self._blocks[name][0] for name in names], device=self._slabs.device)
        target = place.shelf.slabs
        for pool, slab in zip((*self._slabs.keys, *self._slabs.values), (*target.keys, *target.values), strict=True):
            row = slab[:, place.slot, :, : len(names) * BLOCK]  # [layers, G, n · BLOCK, D]
            row.unflatten(2, (len(names), BLOCK)).copy_(pool.index_select(1, at).transpose(1, 2))

    def put(self, key: str, names: Sequence[bytes], place: Slot, first: int, stop: int) -> None:
        """Keep the blocks number `first` to `stop` of a row, unless they are here.

        Args:
            key: of the row's adapter.
            names: of all its blocks.
        """
        if not self.capacity:
            return
        if not self._slabs.keys:
            # Untouched pages of an empty tensor take no memory on a CPU.
            self._slabs.hold(*self._slabs.allocate(self.capacity, BLOCK, zeros=False))
            self._free = list(reversed(range(self.capacity)))
        source = place.shelf.slabs
        for number in range(first, stop):
            if (name := names[number]) in self._blocks:
                continue
            at = self._free.pop() if self._free else self._blocks.popitem(last=False)[1][0]
            self._blocks[name] = at, key
            tokens = slice(number * BLOCK, (number + 1) * BLOCK)
            for pool, slab in zip(
                (*self._slabs.keys, *self._slabs.values), (*source.keys, *source.values), strict=True
            ):
                pool[:, at] = slab[:, place.slot, :, tokens]
        self.match(names[:stop])

    def forget(self, key: str) -> None:
        """Drop the blocks of an adapter."""
        self.drop([name for name, (_, owner) in self._blocks.items() if owner == key])

    def drop(self, names: Sequence[bytes]) -> None:
        """Drop these blocks, if they are here."""
        for name in names:
            if name in self._blocks:
                self._free.append(self._blocks.pop(name)[0])
