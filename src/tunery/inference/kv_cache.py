"""Keys and values of the rows that are being answered.

Rows stand on shelves by how long they are: a shelf holds rows of up to C tokens, C a power of two, as one slab
[layers, slots, G, C, D] for each shape of layer. So all decoding rows of a shelf are read by one batched product with
nothing gathered, no row takes more than twice the memory it needs, and short rows are not padded to the longest one of
the batch. A row that outgrows its shelf is copied to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 128
"""Tokens of the shortest shelf."""

FIRST_TOKENS, FIRST_SLOTS = 2048, 4
"""A new shelf has room for so many tokens or slots, whichever is less, and at least one row."""

KEPT = 0.25
"""Empty shelves stay, ready for the next row, while all shelves take less than this share of the budget."""


class CacheFullError(Exception):
    """No memory is left within the budget."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: G keys of width D and G values of width E."""

    kv_heads: int
    key_width: int
    value_width: int

    @property
    def numbers(self) -> int:
        """Of one token."""
        return self.kv_heads * (self.key_width + self.value_width)


class Slabs:
    """The layers of a model, those of one shape in one tensor: copying a row is one copy for each shape.

    Attributes:
        keys, values: for each shape [layers of it, …].
        layers: (keys, values) of each layer of the model, as views.
    """

    def __init__(self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device):
        self.shapes, self.dtype, self.device = tuple(shapes), dtype, device
        self.kinds = tuple(dict.fromkeys(shapes))
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.layers: list[tuple[Tensor, Tensor]] = []

    def allocate(self, rows: int, length: int, *, zeros: bool = True) -> tuple[list[Tensor], list[Tensor]]:
        """[layers, rows, G, length, D or E] for each shape."""
        make = torch.zeros if zeros else torch.empty
        pairs = [
            tuple(
                make(self.shapes.count(kind), rows, kind.kv_heads, length, width, dtype=self.dtype, device=self.device)
                for width in (kind.key_width, kind.value_width)
            )
            for kind in self.kinds
        ]
        return [k for k, _ in pairs], [v for _, v in pairs]

    def hold(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Take these tensors for one's own."""
        self.keys, self.values = keys, values
        taken = dict.fromkeys(self.kinds, 0)
        self.layers = []
        for shape in self.shapes:
            kind, at = self.kinds.index(shape), taken[shape]
            self.layers.append((keys[kind][at], values[kind][at]))
            taken[shape] = at + 1


class BlockPool:
    """Rows of up to `capacity` tokens, each in a slot.

    Slots are zero at first, and hold finite numbers ever after: what a mask hides is still multiplied by zero.

    Attributes:
        slabs: keys [layers, slots, G, capacity, D], values likewise.
        places: by slot, None where a slot is free.
    """

    def __init__(self, capacity: int, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self.slabs = Slabs(shapes, dtype, device)
        self.places: list[Slot | None] = []

    @property
    def span(self) -> int:
        """One past the last slot in use."""
        return next((slot + 1 for slot in reversed(range(len(self.places))) if self.places[slot]), 0)

    @property
    def used(self) -> int:
        """Slots in use."""
        return sum(place is not None for place in self.places)

    def free_slot(self) -> int | None:
        """The first free slot."""
        return next((slot for slot, place in enumerate(self.places) if place is None), None)

    def grow(self, slots: int) -> None:
        """Have this many slots, with what the present ones hold."""
        keys, values = self.slabs.allocate(slots, self.capacity)
        for old, new in zip((*self.slabs.keys, *self.slabs.values), (*keys, *values), strict=False):
            new[:, : old.shape[1]] = old
        self.slabs.hold(keys, values)
        self.places += [None] * (slots - len(self.places))

    def copy(self, source: Slot, slot: int, length: int) -> None:
        """Copy the first tokens of a row, from this shelf or another, into a slot."""
        theirs = source.shelf.slabs
        for old, new in zip((*theirs.keys, *theirs.values), (*self.slabs.keys, *self.slabs.values), strict=True):
            new[:, slot, :, :length] = old[:, source.slot, :, :length]

    def wipe(self, slot: int) -> None:
        """Zero a slot that may hold numbers which are not finite."""
        for slab in (*self.slabs.keys, *self.slabs.values):
            slab[:, slot] = 0

    def close_gaps(self) -> None:
        """Move rows from the end into free slots, if many are free: a batched product computes these too."""
        span, used = self.span, self.used
        if span <= used + used // 4 + 1:
            return
        while (span := self.span) > self.used:
            place, slot = self.places[span - 1], self.free_slot()
            assert place is not None
            assert slot is not None
            self.copy(place, slot, self.capacity)
            self.places[span - 1], self.places[slot] = None, place
            place.slot = slot


@dataclass(eq=False, slots=True)
class Slot:
    """Where a row's keys and values stand; the cache may move them."""

    shelf: BlockPool
    slot: int


class Cache:
    """All shelves.

    Args:
        shapes: of the model's layers, in order.
        budget: bytes that the shelves may take.
    """

    def __init__(self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device, budget: int):
        self.shapes, self.dtype, self.device, self.budget = tuple(shapes), dtype, device, budget
        self.shelves: dict[int, BlockPool] = {}
        self.token_bytes = sum(shape.numbers for shape in shapes) * dtype.itemsize

    @property
    def longest_row(self) -> int:
        """Tokens of a row that has the whole budget. When it is moved to its last shelf, two shelves hold it."""
        most = SMALLEST
        while 3 * most * self.token_bytes <= self.budget:
            most *= 2
        return most

    def bytes(self) -> int:
        """Held now."""
        return sum(self._bytes(shelf.capacity, len(shelf.places)) for shelf in list(self.shelves.values()))

    def take(self, length: int) -> Slot:
        """A place for a row of so many tokens.

        Raises:
            CacheFullError: no memory is left.
        """
        shelf = self._shelf(length)
        if (slot := shelf.free_slot()) is None:
            slot = len(shelf.places)
            self._grow(shelf)
        place = Slot(shelf, slot)
        shelf.places[slot] = place
        return place

    def extend(self, place: Slot, length: int, filled: int) -> None:
        """Make sure that a row of so many tokens fits; `filled` of them stand there already.

        Raises:
            CacheFullError: no memory is left; the row stays where it is.
        """
        if length <= place.shelf.capacity:
            return
        there = self.take(length)
        there.shelf.copy(place, there.slot, filled)
        self.release(place)
        place.shelf, place.slot = there.shelf, there.slot
        there.shelf.places[there.slot] = place

    def release(self, place: Slot) -> None:
        """The row is gone."""
        place.shelf.places[place.slot] = None

    def tidy(self) -> None:
        """Between two steps: close gaps, and give back shelves that nobody uses if they take much."""
        for shelf in self.shelves.values():
            shelf.close_gaps()
        if self.bytes() > KEPT * self.budget:
            self._drop_empty()

    def _drop_empty(self) -> None:
        self.shelves = {capacity: shelf for capacity, shelf in self.shelves.items() if shelf.used}

    def _shelf(self, length: int) -> BlockPool:
        capacity = max(SMALLEST, 1 << (length - 1).bit_length())
        if capacity not in self.shelves:
            self.shelves[capacity] = BlockPool(capacity, self.shapes, self.dtype, self.device)
        return self.shelves[capacity]

    def _bytes(self, capacity: int, slots: int) -> int:
        return capacity * slots * self.token_bytes

    def _grow(self, shelf: BlockPool) -> None:
        now = len(shelf.places)
        wanted = now or max(1, min(FIRST_SLOTS, FIRST_TOKENS // shelf.capacity))
        if self._room(shelf) < wanted:
            self._drop_empty()
            self.shelves[shelf.capacity] = shelf
        room = self._room(shelf)
        # A first row always finds a place, however small the budget.
        if room < 1 and any(other.used for other in self.shelves.values()):
            raise CacheFullError
        shelf.grow(now + max(1, min(wanted, room)))

    def _room(self, shelf: BlockPool) -> int:
        """Further slots that the budget allows."""
        return (self.budget - self.bytes()) // self._bytes(shelf.capacity, 1)
