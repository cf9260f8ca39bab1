"""The adapters in memory, and those of a step side by side.

For a layer with adapters 1 … n (each A_i [r_i, in], B_i [out, r_i] with its scaling in it) the A_i are stacked to one
matrix [sum r, in] and the B_i put beside each other, [out, sum r]. Then all tokens of a step, whatever their adapters,
need two thin products, with all but a token's own columns set to zero between them: exact zeros, so a token without an
adapter gets the base's output to the bit. Adapters may differ in rank and in the layers they reach.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunery.errors import AdapterError
from tunery.inference.packed import Product, packed, packed_sum, plain, plain_sum
from tunery.inference.served_layers import LayerGroup, LoRAStack, Site
from tunery.lora.adapter import read_adapter
from tunery.lora.layer import LoRAEmbedding, LoRATensors, wrap
from tunery.lora.variants import VARIANTS
from tunery.models.device import on_device, run_in_fresh_thread

LOG = logging.getLogger(__name__)

PATIENCE = 32
"""So many steps adapters that no token asks for stay side by side with the others, before a smaller set is made."""


@dataclass(eq=False)
class Adapter:
    """An adapter, ready to be used.

    Attributes:
        parts: by layer name A [r, in] (of an embedding [vocabulary, r]) and B [out, r], B times the scaling.
        bytes: memory it takes.
        users: rows that are being answered with it.
    """

    key: str
    parts: Mapping[str, tuple[Tensor, Tensor]]
    bytes: int = 0
    users: int = 0

    def __post_init__(self) -> None:
        self.bytes = sum(t.numel() * t.element_size() for pair in self.parts.values() for t in pair)


Run = tuple[Adapter | None, int]
"""So many successive tokens with one adapter; None is the base alone."""


class TokenOwners:
    """Which adapter each token of a step has.

    Args:
        runs: of all tokens in order.
        members: of the adapters side by side.
    """

    def __init__(self, runs: Sequence[Run], members: Sequence[Adapter], device: torch.device):
        number = {adapter: index for index, adapter in enumerate(members)}
        owners = [-1 if adapter is None else number[adapter] for adapter, _ in runs]
        self._alone = len(members) == 1 and -1 not in owners
        if not self._alone:
            each = np.repeat(np.asarray(owners, np.int64), np.asarray([count for _, count in runs], np.int64))
            self._owners = on_device(each, device)
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def mask(self, columns: tuple[int, ...]) -> Tensor | None:
        """Where a column belongs to another adapter than the token, bool [T, len(columns)]; None where none does."""
        if self._alone:
            return None
        if columns not in self._masks:
            owner = on_device(np.asarray(columns, np.int64), self._owners.device)
            self._masks[columns] = self._owners[:, None] != owner[None, :]
        return self._masks[columns]


@dataclass(eq=False)
class AdapterStack:
    """A set of adapters side by side. Each group of layers is put together when it is first asked for."""

    members: tuple[Adapter, ...]
    _joined: dict[LayerGroup, LoRAStack | None] = field(default_factory=dict)

    def low(self, group: LayerGroup) -> LoRAStack | None:
        """For these layers; None where none of the adapters reaches them."""
        if group not in self._joined:
            self._joined[group] = self._join(group)
        return self._joined[group]

    def _join(self, group: LayerGroup) -> LoRAStack | None:
        there = [
            (number, index, *adapter.parts[site.name])
            for number, site in enumerate(group.sites)
            for index, adapter in enumerate(self.members)
            if site.name in adapter.parts
        ]
        if not there:
            return None
        As, Bs = [A for _, _, A, _ in there], [B for _, _, _, B in there]
        columns = tuple(chain.from_iterable([index] * B.shape[1] for _, index, _, B in there))
        together = Bs[0].new_zeros(sum(group.sizes), len(columns))
        ends, blocks, at = [0, *accumulate(group.sizes)], list[tuple[slice, slice]](), 0
        for number, mine in groupby(there, key=lambda part: part[0]):
            rows, start = slice(ends[number], ends[number + 1]), at
            for _, _, _, B in mine:
                together[rows, at : at + B.shape[1]] = B
                at += B.shape[1]
            blocks.append((rows, slice(start, at)))
        zeros = together.numel() - sum(B.numel() for B in Bs)
        return LoRAStack(
            _down(As, group.embedding),
            packed_sum(together) or plain_sum(together),
            together,
            columns,
            tuple(blocks),
            zeros,
        )


def _down(As: Sequence[Tensor], embedding: bool) -> Product:
    """x → A x for all the A one below the other; for an embedding, whose A are [vocabulary, r], ids → their rows."""
    if embedding:
        table = torch.cat(list(As), dim=1)
        return lambda ids: F.embedding(ids, table)
    A = torch.cat(list(As))
    return packed(A, None) or plain(A, None)


class AdapterCache:
    """Loads adapters when they are asked for; the least recently used make room.

    `read` may be called from any thread, everything else from the engine's alone.

    Args:
        modules: of the model as it was loaded, by full name.
        capacity: adapters in memory.
        wake: called, from another thread, when an adapter is there or could not be read.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device, capacity: int, wake: Callable[[], None]):
        self._modules, self._device, self._wake = dict(modules), device, wake
        self.capacity = capacity
        self._sites: dict[str, Site] = {}
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()
        self._reading: dict[str, Future[Adapter]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tunery-adapters")
        self._side: AdapterStack | None = None
        self._steps_too_wide = 0
        self._body: TokenOwners | None = None
        self._kept: TokenOwners | None = None

    # ----------------------------------------------------------------- loading

    def serve(self, groups: Sequence[LayerGroup]) -> None:
        """These are the layers that adapters can reach."""
        self._sites = {site.name: site for group in groups for site in group.sites}

    @property
    def loaded(self) -> list[str]:
        """Keys, the least recently used first."""
        return list(self._loaded)

    def bytes(self) -> int:
        """Memory that the adapters take, without copies side by side."""
        return sum(adapter.bytes for adapter in list(self._loaded.values()))

    def want(self, key: str, folder: Path) -> Adapter | None:
        """The adapter if it is here. If not, it is read in another thread, as soon as there is a place: ask again.

        Raises:
            AdapterError: it cannot be read, or does not fit the base.
        """
        if key in self._loaded:
            self._loaded.move_to_end(key)
            return self._loaded[key]
        reading = self._reading.get(key)
        if reading is None:
            if self._make_room():
                self._reading[key] = self._pool.submit(run_in_fresh_thread, lambda: self.read(key, folder))
                self._reading[key].add_done_callback(lambda _: self._wake())
            return None
        if not reading.done():
            return None
        del self._reading[key]
        self._loaded[key] = reading.result()
        return self._loaded[key]

    def read(self, key: str, folder: Path) -> Adapter:
        """Read an adapter folder and cast it as the layers compute; nothing is kept.

        Raises:
            AdapterError: it cannot be read, does not fit the base, or adapts a layer that mixes tokens.
        """
        pieces = read_adapter(self._modules, folder, lambda note: LOG.warning("adapter %s: %s", key, note))
        variants = {VARIANTS[piece.settings.variant] for piece in pieces.values()}
        if others := [variant.title for variant in variants if not variant.additive]:
            raise AdapterError(
                f"{folder} is a {others[0]} adapter, which rescales the base's weights, so different adapters cannot "
                "share a batch",
                "merge it into a copy of the base (tunery export RUN --to merged) and serve that",
            )
        if strange := [name for name in pieces if name not in self._sites]:
            raise AdapterError(
                f"{folder} adapts {strange[0]}, through which only some of a batch's tokens pass, so different "
                "adapters cannot share it",
                "merge the adapter into a copy of the base and serve that",
            )
        return Adapter(key, {name: self._part(name, piece, folder) for name, piece in pieces.items()})

    def _part(self, name: str, piece: LoRATensors, folder: Path) -> tuple[Tensor, Tensor]:
        site = self._sites[name]
        layer = wrap(site.module)
        A, scaling = piece.A, piece.settings.scaling * layer.output_scale
        if isinstance(layer, LoRAEmbedding):
            A = A.t()
        wide = torch.promote_types(site.dtype, torch.float32)
        B = (piece.B.to(wide) * scaling).to(self._device, site.dtype)
        A = A.to(self._device, site.dtype).contiguous()
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise AdapterError(f"{folder}: {name} holds values too large for {site.dtype}", "train it again")
        return A, B.contiguous()

    def forget(self, key: str) -> None:
        """The adapter was deleted. Rows that are being answered with it end as they began."""
        adapter = self._loaded.pop(key, None)
        if self._side is not None and adapter in self._side.members:
            self._side = None

    def close(self) -> None:
        """End the thread that reads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make_room(self) -> bool:
        """Whether there is a place for one more, after adapters that nobody uses have left."""
        while len(self._loaded) + len(self._reading) >= self.capacity:
            idle = next((key for key, adapter in self._loaded.items() if not adapter.users), None)
            if idle is None:
                return False
            self.forget(idle)
        return True

    # ----------------------------------------------------------------- a step

    def begin(self, body: Sequence[Run], kept: Sequence[Run]) -> None:
        """A step starts.

        Args:
            body: the adapters of all its tokens.
            kept: those of the positions that the output head sees.
        """
        wanted = dict.fromkeys(adapter for adapter, _ in body if adapter is not None)
        if not wanted:
            self._body = self._kept = None
            return
        side = self._side_for(tuple(wanted))
        self._body = TokenOwners(body, side.members, self._device)
        self._kept = TokenOwners(kept, side.members, self._device)

    def low(self, group: LayerGroup) -> tuple[LoRAStack, Tensor | None] | None:
        """See tunery.inference.served_layers.StackSource."""
        tokens = self._kept if group.head else self._body
        if tokens is None or self._side is None or (low := self._side.low(group)) is None:
            return None
        return low, tokens.mask(low.columns)

    def _side_for(self, wanted: tuple[Adapter, ...]) -> AdapterStack:
        """The set at hand if it has all that are wanted, and is not much too wide for too long; else a new one."""
        side = self._side
        if side is not None and set(wanted) <= set(side.members):
            self._steps_too_wide = self._steps_too_wide + 1 if len(wanted) < len(side.members) else 0
            if self._steps_too_wide < PATIENCE:
                return side
        self._side, self._steps_too_wide = AdapterStack(wanted), 0
        return self._side
