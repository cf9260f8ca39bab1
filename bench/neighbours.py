"""Who computes beside tunery in bench/neighbour.py, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = 6
"""Timed steps alone and beside each neighbour, after one to warm up."""

_BUSY = "while True: pass"
_TORCH = """\
import torch
torch.set_num_threads({threads})
x = torch.randn(1024, 1024)
while True:
    x = torch.tanh(x @ x)
"""


@dataclass(frozen=True)
class Neighbour:
    """A program that computes beside tunery.

    Attributes:
        program: Python; "{threads}" stands for as many as there are cores.
        niceness: 19 is the lowest priority.
        goal: the mean step may take so many times as long as alone; None where none is set.
    """

    name: str
    title: str
    program: str
    niceness: int
    goal: float | None = None


NEIGHBOURS = (
    Neighbour("busy-low", "one thread, lowest priority", _BUSY, 19, 1.3),
    Neighbour("torch-low", "PyTorch on all cores, lowest priority", _TORCH, 19, 1.3),
    Neighbour("busy", "one thread, normal priority", _BUSY, 0),
    Neighbour("torch", "PyTorch on all cores, normal priority", _TORCH, 0, 2.2),
)

CLIENTS = 4
ANSWER_TOKENS = 64
GOAL = 0.4
"""Of its speed alone that each keeps beside the other."""
