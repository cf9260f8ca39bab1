"""Ways to add LoRA's update to a frozen product, and the thin products themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bench.gpu_check.check import Check, milliseconds

LAYERS = {"q, k, v": (4096, 6144, 48), "gate and up": (4096, 28672, 32), "down": (14336, 4096, 16)}
"""Of an 8B model: in, out, and the ranks of the stacked adapters together."""

TINY = (64, 96, 16)


def lora(check: Check) -> None:
    """In place (addmm_), out of place (as in compiled layers), or as further columns: one product [x | h]·[W | sB]ᵀ."""
    tokens = 64 if check.tiny else 8188
    for name, layer in LAYERS.items():
        for way, work in ways(check, tokens, *(TINY if check.tiny else layer)).items():
            check.attempt("lora", functools.partial(_measure, check, name, way, work))


def _measure(check: Check, name: str, way: str, work: Callable[[], object]) -> None:
    check.say("lora", layer=name, way=way, ms=milliseconds(check.timed(work), 4))


def ways(check: Check, tokens: int, width: int, out: int, rank: int) -> dict[str, Callable[[], object]]:
    """Each way over `tokens` random tokens."""
    x, h, weight = check.noise(tokens, width), check.noise(tokens, rank), check.noise(out, width)
    a, b = check.noise(rank, width), check.noise(out, rank)
    wider, wider_weight = check.noise(tokens, width + rank), check.noise(out, width + rank)
    y = torch.empty(tokens, out, device=check.device, dtype=x.dtype)
    return {
        "product alone": lambda: torch.mm(x, weight.t(), out=y),
        "in place": lambda: torch.mm(x, weight.t(), out=y).addmm_(h, b.t(), alpha=2.0),
        "out of place": lambda: torch.addmm(torch.mm(x, weight.t()), h, b.t(), alpha=2.0),
        "further columns": lambda: torch.mm(wider, wider_weight.t(), out=y),
        "A x": lambda: torch.mm(x, a.t()),
        "dB": lambda: torch.mm(h.t(), y),
        "thin": lambda: torch.mm(y, b),
    }
