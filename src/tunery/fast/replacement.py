"""Modules of ours in the place of a model's own, which can be given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import nn


class Replacement(nn.Module):
    """A module in the place of another, around that one's parameters and children, under the same names."""

    _origin: tuple[nn.Module, ...] = ()  # a tuple, so that it is not a submodule

    def in_place_of(self, origin: nn.Module) -> Self:
        """This module, which can give back `origin` from now on."""
        self._origin = (origin,)
        return self.train(origin.training)

    def origin(self) -> nn.Module:
        """The model's own module, around the parameters and children that are here now."""
        (origin,) = self._origin
        for name, held in (*self.named_parameters(recurse=False), *self.named_children()):
            setattr(origin, name, held)
        return origin


def replace_modules(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Put what `make` returns in the place of each module inside a model; None leaves one alone.

    Returns:
        How many were replaced.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (made := make(child)) is not None:
                setattr(parent, name, made)
                replaced += 1
    return replaced


def restore_modules(model: nn.Module) -> None:
    """Give a model back its own modules in place of all Replacements."""
    for parent in reversed(list(model.modules())):  # what is inside first
        for name, child in list(parent.named_children()):
            if isinstance(child, Replacement):
                setattr(parent, name, child.origin())
