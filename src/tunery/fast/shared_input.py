"""Layers that are given the same input (query, key and value; gate and up) compute together.

Which layers those are is found out by watching one forward pass (tunery.fast.fused_linear), so no architecture is
named. The first of them
that is called computes all, the others take what is ready. This happens only within `sharing()`, which a run enters
around its forward and backward passes: in anybody else's loop each layer computes for itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tunery.fast.fused_lora import Part, lora_linears

_entered = 0
"""How many `sharing()` contexts are open. Not by thread: a GPU's backward pass recomputes layers in one of its own."""

_waiting: set[SharedInput] = set()
"""Groups that may hold outputs which nobody has taken yet."""


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Within this context layers with the same input compute together."""
    global _entered
    _entered += 1
    try:
        yield
    finally:
        _entered -= 1
        if not _entered:
            forget_outputs()


def forget_outputs() -> None:
    """Let go of all outputs that nobody took, as after a pass that failed."""
    for group in list(_waiting):
        group.forget()
    _waiting.clear()


class Fusable(Protocol):
    """A layer that can compute together with others (tunery.fast.fused_linear.FusedLoRALinear)."""

    def part(self, x: Tensor) -> Part | None: ...


@dataclass(frozen=True, slots=True)
class _Ready:
    source: Tensor
    outputs: dict[Fusable, Tensor]


class SharedInput:
    """Layers of one block with the same input, and the outputs that the first of them computed for the others."""

    def __init__(self, layers: Sequence[Fusable]) -> None:
        self.layers = layers
        self._ready: dict[int, _Ready] = {}  # by thread, and only until the last output is taken

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}  # what is ready belongs to a thread, and is neither copied nor stored

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self._ready = state["layers"], {}

    def outputs(self, layer: Fusable, x: Tensor) -> Tensor | None:
        """The output of `layer` for x [..., in]; None if it should compute for itself."""
        if not _entered:
            return None
        thread = threading.get_ident()
        ready = self._ready.get(thread)
        if ready is None or ready.source is not x or layer not in ready.outputs:
            parts = [part for other in self.layers if (part := other.part(x)) is not None]
            if len(parts) < len(self.layers):  # one of them has no adapter, or drops inputs
                return None
            ready = _Ready(x, dict(zip(self.layers, lora_linears(x, parts), strict=True)))
            self._ready[thread] = ready
            _waiting.add(self)
        output = ready.outputs.pop(layer)
        if not ready.outputs:
            del self._ready[thread]
        return output

    def forget(self) -> None:
        """Let go of outputs that nobody took, whichever thread computed them."""
        self._ready.clear()
