"""Before the first step: imports without pauses, OpenMP threads that wait without spinning, and how long it took."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tunery.progress import Note

SPIN_COUNT = 2000
"""How often a waiting OpenMP thread looks for work before it sleeps. GNU OpenMP's own default is 300,000."""

_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_openmp_spinning() -> None:
    """Let OpenMP threads that wait go to sleep soon, unless the environment already says how they wait.

    GNU OpenMP, which computes for PyTorch on a CPU under Linux, has its threads spin between two operations and at the
    end of each. While a neighbour's thread has taken one core, ours spin on the others and wait for it, and the
    neighbour's spin and wait for theirs: a step then takes up to 24 times as long (docs/lab.md). The library reads its
    settings when it is loaded, so this must come before `import torch`.
    """
    global _too_late
    if any(name in os.environ for name in _WAITING):
        return
    _too_late = "torch" in sys.modules
    if not _too_late:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


_too_late = False


def spinning_warning() -> Note | None:
    """What to say where `limit_openmp_spinning` came too late for a computation on a CPU."""
    if not _too_late or sys.platform != "linux":
        return None
    return Note(
        "torch was imported before tunery, so its OpenMP threads spin while they wait: beside another program that "
        "computes, training becomes many times slower",
        level="warn",
        code="spinning",
        hint=f"import tunery first, or set GOMP_SPINCOUNT={SPIN_COUNT}",
    )


@contextlib.contextmanager
def collector_paused(*, freeze: bool = False) -> Iterator[None]:
    """Import heavy libraries within this context: Python's garbage collector does not run meanwhile.

    torch and transformers make more than a million objects that stay; looking through them again and again while they
    are made takes a fifth of the time of importing them.

    Args:
        freeze: never look through what is there now again; for a process of our own, not for one that others share.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        if freeze:
            gc.freeze()
    finally:
        if was_on:
            gc.enable()


def seconds_since_start(stat: Path = Path("/proc/self/stat")) -> float:
    """Seconds since this process was started by the operating system.

    On Linux by the clock that process start times are counted in; elsewhere as psutil knows it (to about a second).
    """
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        after_name = stat.read_text().rpartition(")")[2].split()  # proc(5): field 22, in clock ticks since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())
