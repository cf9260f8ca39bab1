"""Getting to the first step quickly: imports without pauses, and how long it took."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path


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
