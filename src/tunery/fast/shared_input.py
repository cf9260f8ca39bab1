"""Layers that are given the same input (query, key and value; gate and up) compute together.

Which layers those are is found out by watching one forward pass, so no architecture is named. The first of them that
is called computes all, the others take what is ready. In training this happens only within `sharing()`, which a run
enters around its forward and backward passes: in anybody else's loop each layer computes for itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from tunery.fast.fused_lora import LoRAPart, lora_linears

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


# --------------------------------------------------------------------------- who is given what


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A call of a layer in a forward pass.

    Attributes:
        layer: its full name.
        given: the identity of its input.
        tokens: in that input.
    """

    layer: str
    given: int
    tokens: int


def watch_inputs(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> list[LayerCall]:
    """What layers are given in `run`, one forward pass, call by call.

    Args:
        layers: linear layers and embeddings by full name.
    """
    calls: list[LayerCall] = []
    kept: list[Tensor] = []  # inputs stay alive, so that no two share an identity

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            kept.append(x)
            tokens = x.numel() if isinstance(module, nn.Embedding) else x.numel() // x.shape[-1]
            calls.append(LayerCall(name, id(x), tokens))

        return note

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def by_input(calls: Iterable[LayerCall]) -> list[list[str]]:
    """Names of the layers called, those of one block together that were given one tensor, in the order of the calls."""
    groups: dict[tuple[str, int], list[str]] = {}
    for call in calls:
        block = call.layer.rpartition(".")[0]
        groups.setdefault((block, call.given), []).append(call.layer)
    return list(groups.values())


# --------------------------------------------------------------------------- computing together

Layer = TypeVar("Layer", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Ready(Generic[Layer]):
    source: Tensor
    outputs: dict[Layer, Tensor]


class SharedOutputs(Generic[Layer]):
    """The outputs that the first of some layers with the same input computed for all of them, each until it is taken.

    They belong to the thread that computed them, and are neither copied nor stored.
    """

    def __init__(self) -> None:
        self._ready: dict[int, _Ready[Layer]] = {}  # by thread

    def __reduce__(self) -> tuple[type[SharedOutputs[Layer]], tuple[()]]:
        return type(self), ()

    def take(self, layer: Layer, x: Tensor, compute: Callable[[], dict[Layer, Tensor] | None]) -> Tensor | None:
        """The output of a layer for x.

        Args:
            compute: gives the outputs of all layers, where that of this one is not ready; None if it cannot.
        """
        thread = threading.get_ident()
        ready = self._ready.get(thread)
        if ready is None or ready.source is not x or layer not in ready.outputs:
            if (outputs := compute()) is None:
                return None
            ready = self._ready[thread] = _Ready(x, outputs)
        output = ready.outputs.pop(layer)
        if not ready.outputs:
            del self._ready[thread]
        return output

    def forget(self) -> None:
        """Let go of outputs that nobody took, whichever thread computed them."""
        self._ready.clear()


class Fusable(Protocol):
    """A layer that can compute together with others (tunery.fast.fused_linear.FusedLoRALinear)."""

    def part(self, x: Tensor) -> LoRAPart | None: ...


class SharedInput:
    """Layers of one block with the same input, which compute together within `sharing()`."""

    def __init__(self, layers: Sequence[Fusable]) -> None:
        self.layers = layers
        self._outputs: SharedOutputs[Fusable] = SharedOutputs()

    def outputs(self, layer: Fusable, x: Tensor) -> Tensor | None:
        """The output of `layer` for x [..., in]; None if it should compute for itself."""
        return self._outputs.take(layer, x, lambda: self._compute(x)) if _entered else None

    def _compute(self, x: Tensor) -> dict[Fusable, Tensor] | None:
        parts = [part for layer in self.layers if (part := layer.part(x)) is not None]
        if len(parts) < len(self.layers):  # one of them has no adapter, or drops inputs
            return None
        outputs = dict(zip(self.layers, lora_linears(x, parts), strict=True))
        _waiting.add(self)
        return outputs

    def forget(self) -> None:
        """Let go of outputs that nobody took."""
        self._outputs.forget()
