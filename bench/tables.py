"""What the sections of docs/benchmarks.md share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def processor(machine: Mapping[str, Any]) -> str:
    """Its name, and whether it multiplies matrices of bfloat16: one name stands for several generations."""
    known: bool | None = machine.get("bfloat16_instructions")
    words = "" if known is None else f" {'with' if known else 'without'} bfloat16 instructions"
    return f"{machine['name']}{words}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(text)
