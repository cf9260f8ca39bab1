"""What the machine offers: its devices, the faster number format, the matrix-multiply rate, the memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor

from tunery.errors import ConfigError

T = TypeVar("T")

PROBE_SECONDS = 0.06
"""Time given to each number format in the probe of a CPU."""

WORTH = 1.2
"""bfloat16 is chosen where its products are this much faster; below, its slower element-wise work eats the gain."""

_CPU_SHAPE = (1024, 576, 1536)
"""(tokens, in, out): the feed-forward layer of a 135M-parameter model. A CPU reaches its rate from there upwards."""

_GPU_SHAPE = (4096, 4096, 4096)


_KERNELS_KEPT = 64
"""Compiled kernels that a CPU's products keep at most. A step uses fewer shapes, and the next step has others."""


def bound_kernel_caches() -> None:
    """Keep the memory of compiled kernels bounded, unless the environment says how many to keep.

    oneDNN, which takes a CPU's products, and PyTorch's layer above it compile a kernel for each shape and keep 1,024
    of them each. Flattened batches have new shapes at every step, so these caches grow by some 20 MB a step, to 1.5 GB,
    and are hardly ever read again (docs/lab.md). They look at their settings when the first product is taken.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS_KEPT))


def apart(work: Callable[[], T]) -> T:
    """Do work in a thread that ends with it, and wait; what it raises is raised here.

    On a CPU each thread that computes with PyTorch gets a crew of helpers that stays as long as the thread. GNU
    OpenMP lets waiting helpers sleep at once as soon as there are more of them, in all crews, than processors; waking
    them for every small product then costs a third of the speed (docs/lab.md). So in a process where one thread is
    to compute fast, what others compute is done apart.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tunery-apart") as pool:
        return pool.submit(work).result()


@dataclass(frozen=True)
class Probe:
    """What a short timed matrix product said about number formats.

    Attributes:
        float32_gflops, bfloat16_gflops: measured, in 10^9 floating-point operations a second.
        choice: the format to compute in.
        reason: the choice in a sentence.
    """

    float32_gflops: float
    bfloat16_gflops: float
    choice: torch.dtype
    reason: str


def pick_device(setting: str) -> torch.device:
    """The device that `train.device` means; "auto" is a GPU when there is one.

    Raises:
        ConfigError: that device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if setting == "auto":
        return torch.device(next(kind for kind, present in there.items() if present))
    kind = setting.partition(":")[0]
    if kind not in there:
        raise ConfigError(f"train.device: unknown device {setting!r}", f"known: auto, {', '.join(there)}")
    if not there[kind]:
        built = kind != "cuda" or torch.version.cuda is not None
        why = "none is visible" if built else "this PyTorch was built without it"
        raise ConfigError(f"train.device: there is no {kind} device here ({why})", "use --set train.device=auto")
    return torch.device(setting)


def resolve_dtype(setting: str, device: torch.device) -> tuple[torch.dtype, Probe | None]:
    """The number format that `train.precision` means, and the probe if "auto" asked for one.

    Raises:
        ConfigError: the device cannot compute in that format.
    """
    if setting == "auto":
        probe = probe_precision(device)
        return probe.choice, probe
    if setting == "float64" and device.type == "mps":
        raise ConfigError("train.precision: an mps device has no float64", "use float32, or --set train.device=cpu")
    return getattr(torch, setting), None


def probe_precision(device: torch.device) -> Probe:
    """Time matrix products in float32 and bfloat16; under 0.3 s on a CPU.

    On a processor with AVX512_BF16 or AMX bfloat16 is 2 to 4 times faster, on one without up to 100 times slower, so
    only trying tells. A CUDA device computes in bfloat16 wherever its hardware can.
    """
    wide = matmul_rate(device, torch.float32, PROBE_SECONDS) / 1e9
    narrow = matmul_rate(device, torch.bfloat16, PROBE_SECONDS) / 1e9
    if device.type == "cuda":
        fits = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = "the GPU computes bfloat16 in hardware" if fits else "the GPU has no bfloat16 in hardware"
    else:
        fits = narrow >= WORTH * wide
        words = f"{narrow / wide:.1f} times as fast as" if narrow >= wide else f"{wide / narrow:.1f} times slower than"
        reason = f"bfloat16 is {words} float32 on this {device.type} ({narrow:,.0f} against {wide:,.0f} GFLOP/s)"
    return Probe(wide, narrow, torch.bfloat16 if fits else torch.float32, reason)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """Floating-point operations a second that matrix products alone reach: the best of several within `seconds`.

    A format without hardware support is timed on a product 16 times smaller, so the time is kept to in any case.
    """
    tokens, width, out = _CPU_SHAPE if device.type == "cpu" else _GPU_SHAPE
    small = tokens // 16
    _product_seconds(small, width, out, dtype, device)  # libraries set themselves up in the first call
    taken = _product_seconds(small, width, out, dtype, device)
    rate = 2.0 * small * width * out / taken
    started, budget = time.perf_counter(), max(seconds - taken, 0.0)
    if 2.0 * tokens * width * out / rate > budget:
        return rate
    while True:
        taken = _product_seconds(tokens, width, out, dtype, device)
        rate = max(rate, 2.0 * tokens * width * out / taken)
        if time.perf_counter() - started > budget:
            return rate


@torch.no_grad()
def _product_seconds(tokens: int, width: int, out: int, dtype: torch.dtype, device: torch.device) -> float:
    x = torch.ones(tokens, width, dtype=dtype, device=device)
    weight = torch.ones(out, width, dtype=dtype, device=device)
    _synchronize(device)
    started = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    _synchronize(device)
    return max(time.perf_counter() - started, 1e-9)


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A NumPy array as a tensor on a device.

    To a GPU it goes through page-locked memory, so that the copy runs beside the computation and nothing waits for it
    (docs.nvidia.com/cuda/cuda-c-programming-guide, asynchronous concurrent execution).
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --------------------------------------------------------------------------- facts


def describe_device(device: torch.device) -> dict[str, Any]:
    """{"kind", "name", "threads", "memory_bytes"}. Of a GPU: its name and memory, and the CPU threads that feed it."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        name, memory = facts.name, facts.total_memory
    else:
        name, memory = _processor_name(), psutil.virtual_memory().total
    return {"kind": device.type, "name": name, "threads": torch.get_num_threads(), "memory_bytes": int(memory)}


def _processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        lines = cpuinfo.read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, subprocess.SubprocessError):
        return platform.processor() or platform.machine()


# --------------------------------------------------------------------------- memory


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated now: of a GPU its free memory, else main memory within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    limit = _container_headroom()
    free = psutil.virtual_memory().available
    return int(free if limit is None else min(free, limit))


def _container_headroom(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left below the tightest limit of this process's control groups; None where there is no limit.

    File pages that the kernel would drop under pressure (`inactive_file`) count as free. Linux, cgroup v2 and v1:
    docs.kernel.org/admin-guide/cgroup-v2.html, cgroup-v1/memory.html.
    """
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    rooms = []
    for number, controllers, place in entries:
        if number == "0":
            top, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = top / place.lstrip("/")
        # Inside a container the named group may not be visible; its limit then stands at the top.
        rooms += [_headroom(group, limit, usage) for group in (folder, *folder.parents) if group.is_relative_to(top)]
    return min((room for room in rooms if room is not None), default=None)


def _headroom(group: Path, limit: str, usage: str) -> int | None:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if most == "max":
        return None
    reclaimable = int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))
    return max(0, int(most) - used + reclaimable)


def resident_memory(device: torch.device) -> int:
    """Bytes of main memory that this process holds now; 0 for a device with a memory of its own."""
    return int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: by tensors on a GPU, else resident in this process (libraries and mapped files too)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # bytes on macOS, KiB elsewhere
