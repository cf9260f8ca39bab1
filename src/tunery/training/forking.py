"""What a process needs that forks others and computes beside them: shared memory, signals, threads, its own memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import signal
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor


@contextlib.contextmanager
def thread_count(threads: int) -> Generator[None]:
    """Within this context PyTorch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shared_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of the same shapes in memory that processes forked later share; not in /dev/shm, which is often small."""
    sizes = [-(-tensor.numel() * tensor.element_size() // 64) * 64 for tensor in tensors]
    memory, at = mmap.mmap(-1, max(1, sum(sizes))), 0
    made: list[Tensor] = []
    for tensor, size in zip(tensors, sizes, strict=True):
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=at)
        made.append(flat.view(tensor.shape))
        at += size
    return made


_ASKED_TO_STOP = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def signals_held_back() -> Generator[None]:
    """SIGINT and SIGTERM wait until this context ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED_TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """In a process just forked: end when the parent does, however it ends, and leave a Ctrl-C or a SIGTERM, which a
    terminal or a service manager sends to both, to the parent."""
    for number in _ASKED_TO_STOP:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED_TO_STOP)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1
"""prctl(2)."""


def anonymous_bytes(*, peak: bool = False, status: Path = Path("/proc/self/status")) -> int:
    """Memory of this process that is neither a file's nor shared; the most so far, if wanted.

    The system knows the peak of all kinds together (proc(5), VmHWM). Files and shared memory, which only grow here, are
    taken off.
    """
    found: dict[str, int] = {}
    for line in status.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssAnon", "RssFile", "RssShmem"):
            found[name] = int(value.split()[0]) * 1024
    return found["VmHWM"] - found["RssFile"] - found["RssShmem"] if peak else found["RssAnon"]
