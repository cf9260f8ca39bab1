"""A progress bar in a notebook: one output that changes, in place of a line for every few steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

_KERNELS = ("ZMQInteractiveShell", "Shell")
"""Classes of IPython's shell where outputs are shown by a browser: Jupyter's, and Colab's."""


@dataclass(frozen=True)
class BarState:
    """How far a run is, as a notebook shows it: a bar in a browser, a line elsewhere."""

    done: int
    total: int
    words: str

    def __repr__(self) -> str:
        return f"step {self.done}/{self.total} · {self.words}" if self.words else f"step {self.done}/{self.total}"

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self.done}" max="{self.total}" style="width: 20em"></progress>'
        return f'<div role="status">{bar} {escape(repr(self))}</div>'


def open_bar(state: BarState) -> Callable[[BarState], None] | None:
    """Show a bar below the cell that is running; what changes it. None where no notebook shows what this prints."""
    ipython: Any = sys.modules.get("IPython")  # a notebook has loaded it, and nobody else needs it
    if ipython is None or type(ipython.get_ipython()).__name__ not in _KERNELS:
        return None
    handle = ipython.display.display(state, display_id=True)
    return None if handle is None else handle.update
