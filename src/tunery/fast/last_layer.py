"""The last decoder layer works only where something is predicted.

Nothing after the last layer mixes positions. So its feed-forward part and the projection of its attention's output are
computed at the predicting positions only: a hook takes these rows out before, another puts the result back among zeros,
which nobody reads. Keys and values are needed everywhere, and its norms and queries are left as they are (about a tenth
of the layer's work).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunery.lora.attach import base_parameters
from tunery.models.quantized import numel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense")


class LastLayer:
    """Hooks on the last layer of a model.

    Attributes:
        positions: int64 [S], the rows of [1, T, d] that are wanted; None computes all.
        parameters: as `last_layer_parameters`.
        row: any tensor of T numbers. (Not T itself: torch.compile would compile the layer for each T.)
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.positions: Tensor | None = None
        self.row: Tensor | None = None
        self._entered = 0
        self._hooks: list[RemovableHandle] = []
        self.parameters = last_layer_parameters(model)
        for module in _row_wise(model):
            self._hooks.append(module.register_forward_pre_hook(self._take))
            self._hooks.append(module.register_forward_hook(self._put_back))

    def __bool__(self) -> bool:
        return bool(self._hooks)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """What is asked for holds until the outermost of these contexts ends: a backward pass may recompute."""
        self._entered += 1
        try:
            yield
        finally:
            self._entered -= 1
            if not self._entered:
                self.positions = self.row = None

    def only(self, positions: Tensor | None, row: Tensor | None = None) -> None:
        """Compute these positions [S] of the tokens `row` [T]; None computes all."""
        self.positions, self.row = positions, row

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _take(self, module: nn.Module, args: tuple[Tensor, *tuple[object, ...]]) -> tuple[object, ...] | None:
        if self.positions is None:
            return None
        return (args[0].index_select(1, self.positions), *args[1:])

    def _put_back(
        self, module: nn.Module, args: tuple[object, ...], output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...] | None:
        if self.positions is None:
            return None
        if isinstance(output, tuple):  # a mixture of experts also returns its router's scores
            return (self._spread(output[0]), *output[1:])
        return self._spread(output)

    def _spread(self, rows: Tensor) -> Tensor:
        assert self.positions is not None
        assert self.row is not None
        full = rows.new_zeros(rows.shape[0], self.row.shape[0], rows.shape[2])
        return full.index_copy(1, self.positions, rows)


def last_layer_parameters(model: PreTrainedModel) -> int:
    """The base's numbers in the matrices that are used at the predicting positions only."""
    matrices = {id(p): p for module in _row_wise(model) for p in base_parameters(module) if p.dim() >= 2}
    return sum(numel(p) for p in matrices.values())


def _row_wise(model: PreTrainedModel) -> list[nn.Module]:
    """The last layer's modules that treat every position alike, by their usual names; none if it has none of them."""
    layers = getattr(model.get_decoder(), "layers", None) or getattr(model.get_decoder(), "h", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    block = layers[-1]
    attention = next((m for name in _ATTENTION if (m := getattr(block, name, None)) is not None), None)
    found = [
        next((m for name in names if (m := getattr(owner, name, None)) is not None), None)
        for owner, names in ((block, _FEED_FORWARD), (attention, _OUTPUT))
    ]
    return [module for module in found if module is not None]
