"""The base model, made ready to serve: one step of many rows in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from tunery.errors import ModelError
from tunery.fast.packed_model import TOLERANCE, optimize_model, probe_rows, restore_model
from tunery.fast.trial import relative_difference
from tunery.inference.adapter_cache import Adapter, AdapterCache
from tunery.inference.cached_attention import (
    NAME,
    AttentionWatcher,
    CachedLayers,
    DecodeBatch,
    Layout,
    PrefillChunk,
)
from tunery.inference.kv_cache import Cache, LayerShape, Slot
from tunery.inference.served_layers import serve_layers, served_inputs
from tunery.lora.targets import plain_modules
from tunery.models.device import on_device
from tunery.models.load import Base
from tunery.models.windows import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ELSEWHERE = "serve it with another engine (tunery serve --engine URL of a vLLM or llama.cpp server)"


Owner = TypeVar("Owner")


@dataclass(eq=False)
class RunnerPart(Generic[Owner]):
    """What one row gives to a step.

    Attributes:
        row: whose it is; the runner does not ask.
        tokens: to compute, from position `start` on; what is before them is in the cache.
        keep: the logits after so many of the last of them are wanted.
    """

    row: Owner
    place: Slot
    adapter: Adapter | None
    tokens: Sequence[int]
    start: int
    keep: int


class Runner:
    """A base model whose layers are ServedLayers and whose attention reads the cache.

    Attributes:
        shapes: of the layers' keys and values.
        vocabulary: number of logits.
        context: the most tokens of a row, prompt and answer together.
        bank: the adapters.

    Args:
        base: its model is changed for good.
        adapters: the most in memory.
        wake: see AdapterCache.

    Raises:
        ModelError: the model cannot be computed this way.
    """

    def __init__(self, base: Base, adapters: int, wake: Callable[[], None]):
        self.model = base.model
        self.device, self.dtype = self.model.device, self.model.dtype
        self.context = _context(self.model)
        found = optimize_model(self.model, kernels=False)
        restore_model(self.model)
        if not found.flattened:
            raise ModelError(
                f"{base.info.name} ({base.info.architecture}) mixes tokens in other ways than by attention alone, so "
                "requests cannot share a batch here",
                _ELSEWHERE,
            )
        rows = [row.ids.tolist() for row in probe_rows(self.model.config)]
        with torch.inference_mode():
            truth = [self._plain(row) for row in rows]
        self.vocabulary = truth[0].shape[-1]
        modules = dict(plain_modules(self.model))
        self.bank = AdapterCache(modules, self.device, adapters, wake)
        self._with_layers(rows[0])
        head = self.model.get_output_embeddings()
        self._head = replace(found.head, layer=head) if found.head else None
        self.model.set_attn_implementation(NAME)
        self.shapes = self._find_shapes(rows[0])
        self._check(base.info.name, rows, truth)

    def run(self, parts: Sequence[RunnerPart[Owner]]) -> tuple[list[RunnerPart[Owner]], Tensor]:
        """Compute a step, storing keys and values.

        Returns:
            (the parts with `keep` above zero, logits [sum of their keep, vocabulary] in that order, float32 or wider).
        """
        ordered, layout = self._lay_out(parts)
        ids = np.fromiter((token for part in ordered for token in part.tokens), np.int64)
        positions = np.concatenate([np.arange(p.start, p.start + len(p.tokens)) for p in ordered])
        ends = np.cumsum([len(part.tokens) for part in ordered])
        kept = [(part, end) for part, end in zip(ordered, ends.tolist(), strict=True) if part.keep]
        sources = np.concatenate([np.arange(end - p.keep, end) for p, end in kept] or [np.zeros(0, np.int64)])
        self.bank.begin([(p.adapter, len(p.tokens)) for p in ordered], [(p.adapter, p.keep) for p, _ in kept])
        with torch.inference_mode():
            logits = self._logits(ids, positions, sources, layout)
        if self.device.type == "mps":  # has no float64, in which tokens are drawn
            logits = logits.cpu()
        return [part for part, _ in kept], logits

    # ----------------------------------------------------------------- a step

    def _lay_out(self, parts: Sequence[RunnerPart[Owner]]) -> tuple[list[RunnerPart[Owner]], Layout]:
        """The order of the parts in the packed sequence, and their attention."""
        singles = [part for part in parts if len(part.tokens) == 1]
        singles.sort(key=lambda part: (part.place.shelf.capacity, part.place.slot))
        stretches = [part for part in parts if len(part.tokens) > 1]
        pieces: list[DecodeBatch | PrefillChunk] = []
        at = 0
        for _, group in groupby(singles, key=lambda part: part.place.shelf.capacity):
            rows = list(group)
            pieces.append(self._singles(rows, slice(at, at + len(rows))))
            at += len(rows)
        for part in stretches:
            stop = part.start + len(part.tokens)
            where = slice(at, at + len(part.tokens))
            pieces.append(PrefillChunk(part.place.shelf, part.place.slot, where, part.start, stop))
            at = where.stop
        return singles + stretches, Layout(pieces)

    def _singles(self, rows: Sequence[RunnerPart[Owner]], at: slice) -> DecodeBatch:
        slots = np.asarray([part.place.slot for part in rows])
        positions = np.asarray([part.start for part in rows])
        return DecodeBatch(
            rows[0].place.shelf,
            at,
            on_device(slots, self.device),
            on_device(positions, self.device),
            longest=int(positions.max()) + 1,
            shortest=int(positions.min()) + 1,
            span=int(slots[-1]) + 1,
        )

    def _logits(self, ids: np.ndarray, positions: np.ndarray, sources: np.ndarray, layers: CachedLayers) -> Tensor:
        """Logits [len(sources), vocabulary] at these places of the packed sequence."""
        inputs: dict[str, object] = {
            "input_ids": on_device(ids, self.device)[None],
            "position_ids": on_device(positions, self.device)[None],
            "use_cache": False,
            "served": layers,
        }
        keep = on_device(sources, self.device)
        if self._head is not None:
            hidden = self.model.get_decoder()(**inputs).last_hidden_state[0]
            if not len(sources):
                return hidden.new_zeros(0, self.vocabulary)
            return self._head.logits(hidden.index_select(0, keep))
        if not len(sources):
            keep = keep.new_zeros(1)
        logits = self.model(**inputs, logits_to_keep=keep).logits[0][: len(sources)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    # ----------------------------------------------------------------- getting ready

    def _plain(self, row: Sequence[int]) -> Tensor:
        """Logits of one row as transformers computes them, [T, vocabulary]."""
        return self.model(input_ids=torch.tensor([row], device=self.device), use_cache=False).logits[0]

    def _with_layers(self, row: Sequence[int]) -> None:
        with torch.inference_mode():
            calls = served_inputs(self.model, lambda: self._plain(row))
        self._groups = serve_layers(self.model, calls, len(row), self.bank)
        self.bank.serve(self._groups)

    @torch.inference_mode()
    def _find_shapes(self, row: Sequence[int]) -> tuple[LayerShape, ...]:
        watcher = AttentionWatcher()
        ids = np.asarray(row)
        self._logits(ids, np.arange(len(ids)), np.arange(1), watcher)
        return tuple(watcher.shapes)

    def _check(self, name: str, rows: Sequence[Sequence[int]], truth: Sequence[Tensor]) -> None:
        """Rows computed piece by piece through a cache must give the logits of the untouched model.

        Raises:
            ModelError: they do not.
        """
        cache = Cache(self.shapes, self.dtype, self.device, 1 << 40)
        places = [cache.take(len(row)) for row in rows]
        got: list[list[Tensor]] = [[] for _ in rows]
        for low, high in _pieces(max(map(len, rows))):
            parts = [
                RunnerPart(None, place, None, row[low:high], low, len(row[low:high]))
                for place, row in zip(places, rows, strict=True)
                if row[low:high]
            ]
            kept, logits = self.run(parts)
            for part, some in zip(kept, logits.split([part.keep for part in kept]), strict=True):
                got[places.index(part.place)].append(some)
        for mine, theirs in zip(got, truth, strict=True):
            if not relative_difference(torch.cat(mine), theirs) <= TOLERANCE.get(self.dtype, 0.1):
                raise ModelError(f"{name} gives other answers when requests share a batch", _ELSEWHERE)

    def forget_step(self) -> None:
        """Let go of what a step that failed left in the layers."""
        for group in self._groups:
            group.forget()


def _pieces(length: int) -> list[tuple[int, int]]:
    """Six tokens, a stretch, and the last four one by one."""
    borders = [0, 6, *range(max(7, length - 4), length + 1)]
    return list(pairwise(borders))


def _context(model: PreTrainedModel) -> int:
    """The most tokens of a row.

    Under "longrope" positions turn in another way as soon as any row of a batch is longer than the model was first
    trained with, so such rows are not taken.
    """
    config = model.config.get_text_config()
    most = context_length(model.config)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope":
            first = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", most
            )
            most = min(most, int(first))
    return most
