"""What every peer shares: the workload it reads, and the lines it writes. Needs nothing but Python itself.

A peer is started as `python -m bench.peers.with_NAME WORKLOAD`. It loads the base, puts the given adapter on it and
writes the line "ready". Then, for each step, it waits for a line on its standard input, trains one batch and writes one
line; so the process that compares two peers lets them work in turn. When its input ends, so does the peer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IGNORED = -100
"""The label of a token that is not trained, to PyTorch's cross-entropy and all who use it."""


@dataclass(frozen=True)
class Row:
    """One tokenised row: `trained` says, token by token, whether it is predicted. The first token never is."""

    ids: list[int]
    trained: list[bool]

    @property
    def labels(self) -> list[int]:
        """The tokens to predict, and IGNORED elsewhere."""
        return [token if trained else IGNORED for token, trained in zip(self.ids, self.trained, strict=True)]


@dataclass(frozen=True)
class Pair:
    """A tokenised preference: a prompt with the better and the worse answer."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Workload:
    """What to train and how; the same for every peer (written by bench.workloads).

    Attributes:
        folder: where rows.jsonl lies, batch after batch in the order of training.
        kind: "rows" or "pairs".
        base: folder of the base model, safetensors in bfloat16.
        adapter: folder of the adapter to start from, in PEFT's format: A random, B zero.
        precision: dtype to compute in, "bfloat16" or "float32".
        alpha, rank: of LoRA on all linear layers of the decoder, without dropout.
        learning_rate: of AdamW without weight decay, the same at every step.
        max_grad_norm: gradients are clipped to it.
        beta: of DPO; only for pairs.
        micro_batch: rows (or pairs) that peers which must be told compute at a time; peer → number.
    """

    folder: Path
    name: str
    kind: str
    base: str
    adapter: str
    precision: str
    batch_size: int
    rank: int
    alpha: float
    learning_rate: float
    max_grad_norm: float
    seed: int
    beta: float = 0.1
    micro_batch: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, precision: str | None = None) -> Workload:
        """The workload in a folder, computed in another dtype if one is given."""
        facts = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
        if precision:
            facts["precision"] = precision
        return cls(folder=folder, **facts)

    def rows(self) -> list[Row]:
        """All rows (kind "rows"), in the order of training."""
        return [Row(line["ids"], [bool(t) for t in line["trained"]]) for line in self._lines()]

    def pairs(self) -> list[Pair]:
        """All pairs (kind "pairs"), in the order of training."""
        return [Pair(**line) for line in self._lines()]

    def micro(self, peer: str) -> int:
        """How many rows this peer computes at a time."""
        return min(self.micro_batch.get(peer, self.batch_size), self.batch_size)

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Cut a sequence into lists of `size`; a rest is left out, since a step is a full batch."""
    for start in range(0, len(items) - size + 1, size):
        yield list(items[start : start + size])


def options(description: str, *variants: str) -> argparse.Namespace:
    """The command line of a peer: the workload's folder, and which variant of the peer."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("workload", type=Path, help="folder with workload.json and rows.jsonl")
    parser.add_argument("--precision", help="compute in this dtype instead of the workload's")
    parser.add_argument("--variant", choices=variants or None, default=variants[0] if variants else None)
    return parser.parse_args()


def version_of(package: str) -> str:
    """Of an installed distribution; "unknown" for one that runs from its sources alone."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class Lines:
    """The peer's side of the conversation. Whatever libraries print goes to stderr, so that stdout holds lines only."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def ready(self, *packages: str, **facts: Any) -> None:
        """Everything is loaded; the next thing is a step."""
        versions = {name: version_of(name) for name in packages}
        self._write(event="ready", versions={"python": platform.python_version(), **versions}, **facts)

    def wait(self) -> None:
        """Until told to go on; the end of the conversation is the end of the process."""
        if not sys.stdin.readline():
            self._write(event="end", peak_bytes=peak_memory())
            self._out.close()
            os._exit(0)  # trainers save and clean up on their way out, which nobody waits for

    def step(
        self, number: int, seconds: float, loss: float, data_tokens: int, trained_tokens: int, **facts: Any
    ) -> None:
        """A step has been taken.

        Args:
            number: from 0.
            seconds: from the batch at hand to the adapter updated.
            loss: mean over the trained tokens of the batch; of pairs, over the pairs.
            data_tokens: of the rows in full, padding left out; of a pair, both rows.
            trained_tokens: predicted tokens.
        """
        self._write(
            event="step",
            step=number,
            seconds=seconds,
            loss=loss,
            data_tokens=data_tokens,
            trained_tokens=trained_tokens,
            peak_bytes=peak_memory(),
            **facts,
        )

    def _write(self, **line: Any) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def train_rows(lines: Lines, work: Workload, step: Callable[[list[Row]], float]) -> None:
    """Train the workload's batches, a step at a time, until told no more.

    Args:
        step: one optimizer step over a batch; returns the mean loss over its trained tokens.
    """
    for number, rows in enumerate(batches(work.rows(), work.batch_size)):
        lines.wait()
        started = time.perf_counter()
        loss = step(rows)
        seconds = time.perf_counter() - started
        data, trained = sum(len(row.ids) for row in rows), sum(sum(row.trained) for row in rows)
        lines.step(number, seconds, loss, data, trained)
    lines.wait()


def finish() -> None:
    """Wait until a GPU, if there is one, has done what it was given."""
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Most memory this process has held, in bytes: of the GPU's by tensors, where there is one, else main memory."""
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident()


def peak_resident(status: Path = Path("/proc/self/status")) -> int:
    """Most main memory this process has held, in bytes.

    On Linux from VmHWM: getrusage would also count the process that started this one, up to its exec.
    """
    try:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
