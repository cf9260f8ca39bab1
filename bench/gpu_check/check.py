"""What all parts share: how large they measure and where, how they time, and where their results go."""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import SHAPES

T = TypeVar("T")
Shape = dict[str, int | float | bool]

SMALL: Shape = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""Of SmolLM2-135M."""

TINY: Shape = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
"""Of the rehearsal."""

RESULTS = "results.jsonl"
REPEATS, WARM_UPS = 20, 3
"""Of what is timed by the device's own clock."""


@dataclass(frozen=True)
class Check:
    """Where a part measures, how much, and the file that takes its results.

    Attributes:
        tiny: rehearse on the CPU.
        out: folder of results.jsonl.
        length: tokens of a row.
        steps: timed optimizer steps, after two to warm up.
    """

    tiny: bool
    out: Path
    length: int = field(init=False)
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", 96 if self.tiny else 2048)
        object.__setattr__(self, "steps", 2 if self.tiny else 5)

    @property
    def device(self) -> torch.device:
        """The GPU; of a rehearsal the CPU."""
        return torch.device("cpu" if self.tiny else "cuda:0")

    def shape(self, name: str) -> Shape:
        """The configuration of "8b", "70b" or "135m"; of a rehearsal always the tiny one."""
        return TINY if self.tiny else {**SHAPES, "135m": SMALL}[name]

    @property
    def vocabulary(self) -> int:
        """Token ids of random rows are below this."""
        return int(min(40_000, self.shape("8b")["vocab_size"]))

    # ----------------------------------------------------------------------- results

    def say(self, part: str, **facts: object) -> None:
        """A result: printed, and kept whatever comes after."""
        line = json.dumps({"part": part, "at": round(time.time(), 1), **facts}, default=str)
        print(line, flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def attempt(self, part: str, work: Callable[[], T]) -> T | None:
        """Do some work; if it fails, that is a result too, and the rest goes on. None if it failed."""
        try:
            return work()
        except Exception as error:  # whatever a driver, a compiler or a library may raise
            traceback.print_exc(file=sys.stdout)
            self.say(part, failed=f"{type(error).__name__}: {str(error)[:300]}")
        # Outside the handler: the traceback holds on to the tensors of the failed work.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    # ----------------------------------------------------------------------- measuring

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def since(self, started: float) -> float:
        """Seconds since `started` (time.perf_counter) until the GPU has done what it was given, rounded to 0.1."""
        self.wait()
        return round(time.perf_counter() - started, 1)

    def timed(self, work: Callable[[], object]) -> float:
        """Median seconds of `work` on the GPU, by its events; of a rehearsal, the seconds of one call."""
        for _ in range(1 if self.tiny else WARM_UPS):
            work()
        self.wait()
        if self.device.type != "cuda":
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        pairs = []
        for _ in range(REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        self.wait()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def noise(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random numbers on the device. (Zeros and ones would multiply faster: fewer bits flip.)"""
        return torch.randn(*size, device=self.device, dtype=dtype)

    def product_rate(self, m: int, k: int, n: int) -> float:
        """Floating-point operations per second of x Wᵀ, x [m, k], W [n, k], in bfloat16; at most 64 in a rehearsal."""
        if self.tiny:
            m, k, n = (min(64, size) for size in (m, k, n))
        x, weight = self.noise(m, k), self.noise(n, k)
        return 2.0 * m * k * n / self.timed(lambda: F.linear(x, weight))

    def peak_bytes(self) -> int | None:
        """Most bytes that tensors have held on the GPU; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def milliseconds(seconds: float, digits: int = 1) -> float:
    """Seconds as milliseconds, rounded."""
    return round(1e3 * seconds, digits)


def gigabytes(size: int | None) -> float | None:
    """Bytes as GB, rounded."""
    return None if size is None else round(size / 1e9, 2)


Part = Callable[[Check], Any]
"""A part of the check: measures, and says what it found."""
