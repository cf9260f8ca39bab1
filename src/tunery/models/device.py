"""What the machine offers: its devices, the faster dtype, the matmul rate, the memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor

from tunery.errors import ConfigError

T = TypeVar("T")

PROBE_ROUNDS = 8
"""How often the probe of a CPU times each dtype, in turn."""

PROBE_SECONDS = 1.0
PROBE_LEAST = 3
"""The probe ends after PROBE_SECONDS even if fewer rounds are done, but this many are left to a starved process."""

WORTH = 1.2
"""bfloat16 is chosen where its matmuls are this much faster; below, its slower element-wise work eats the gain."""

RATE_SECONDS = 0.15

_CPU_SHAPE = (1024, 576, 1536)
"""(tokens, in, out): the feed-forward layer of a 135M-parameter model. A CPU reaches its rate from there upwards."""

_GPU_SHAPE = (8192, 8192, 8192)
_GPU_REPEATS = 20
"""Matmuls between two events of a GPU, so that launching them is not part of the time."""


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


def run_in_fresh_thread(work: Callable[[], T]) -> T:
    """Do work in a thread that ends with it, and wait; what it raises is raised here.

    On a CPU each thread that computes with PyTorch gets a crew of helpers that stays as long as the thread. GNU
    OpenMP lets waiting helpers sleep at once as soon as there are more of them, in all crews, than processors; waking
    them for every small product then costs a third of the speed (docs/lab.md). So in a process where one thread is
    to compute fast, what others compute is done apart.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tunery-apart") as pool:
        return pool.submit(work).result()


@dataclass(frozen=True)
class PrecisionProbe:
    """What the hardware and a short timed matmul said about dtypes.

    Attributes:
        float32_gflops, bfloat16_gflops: measured, in 10^9 floating-point operations per second; None where the
            processor says that it has no bfloat16 instructions, which is not worth timing.
        choice: the dtype to compute in.
        reason: the choice in a sentence.
    """

    float32_gflops: float
    bfloat16_gflops: float | None
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


def resolve_dtype(setting: str, device: torch.device) -> tuple[torch.dtype, PrecisionProbe | None]:
    """The dtype that `train.precision` means, and the probe if "auto" asked for one.

    Raises:
        ConfigError: the device cannot compute in that format.
    """
    if setting == "auto":
        probe = probe_precision(device)
        return probe.choice, probe
    if setting == "float64" and device.type == "mps":
        raise ConfigError("train.precision: an mps device has no float64", "use float32, or --set train.device=cpu")
    return getattr(torch, setting), None


def probe_precision(device: torch.device) -> PrecisionProbe:
    """Which of float32 and bfloat16 computes faster; under 0.5 s on an idle CPU.

    A processor without bfloat16 instructions converts, and is up to 100 times slower; it says so itself where Linux
    lists its features. Elsewhere matmuls of both dtypes are timed in turn and the best of each counts, so that a
    program that computes beside this one slows both alike. A CUDA device computes in bfloat16 where its hardware can.
    """
    if device.type == "cuda":
        wide, narrow = (matmul_rate(device, dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16))
        fits = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = "the GPU computes bfloat16 in hardware" if fits else "the GPU has no bfloat16 in hardware"
        return PrecisionProbe(wide, narrow, torch.bfloat16 if fits else torch.float32, reason)
    if device.type == "cpu" and has_bfloat16_instructions() is False:
        wide = matmul_rate(device, torch.float32, RATE_SECONDS / 2) / 1e9
        return PrecisionProbe(wide, None, torch.float32, "this processor has no instructions for bfloat16 matmuls")
    wide, narrow = (rate / 1e9 for rate in _in_turn(device, (torch.float32, torch.bfloat16)))
    fits = narrow >= WORTH * wide
    words = f"{narrow / wide:.1f} times as fast as" if narrow >= wide else f"{wide / narrow:.1f} times slower than"
    reason = f"bfloat16 is {words} float32 on this {device.type} ({narrow:,.0f} against {wide:,.0f} GFLOP/s)"
    return PrecisionProbe(wide, narrow, torch.bfloat16 if fits else torch.float32, reason)


_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "svebf16"})
"""Features under which Linux lists bfloat16 dot products: on x86 (flags), on Arm (Features)."""


def has_bfloat16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor multiplies matrices of bfloat16; None where the system does not list its features."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    listed = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), None)
    return None if listed is None else not _BFLOAT16_FLAGS.isdisjoint(listed)


def _in_turn(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[float]:
    """The best rate of each dtype over PROBE_ROUNDS matmuls, one of each in turn. Floating-point operations per second.

    The matmuls of a dtype that is slow stay small, so that the time is bounded in any case.
    """
    best = [0.0] * len(dtypes)
    timers = [_Matmul(device, dtype) for dtype in dtypes]
    started = time.perf_counter()
    for done in range(1, PROBE_ROUNDS + 2):
        best = [max(rate, timer.rate()) for rate, timer in zip(best, timers, strict=True)]
        if done >= PROBE_LEAST and time.perf_counter() - started > PROBE_SECONDS:
            break
        for rate, timer in zip(best, timers, strict=True):
            if 20 * rate > max(best):
                timer.grow()
    return best


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = RATE_SECONDS) -> float:
    """Floating-point operations per second that matmuls alone reach: the best of several within `seconds`.

    A dtype without hardware support is timed on small matmuls, so the time is kept to in any case. One that seems slow
    is not taken for such at once: another program may have had the cores.
    """
    timer = _Matmul(device, dtype)
    rate, started = timer.rate(), time.perf_counter()
    for _ in range(PROBE_LEAST - 1):
        if timer.full_flops / rate > seconds:
            rate = max(rate, timer.rate())
    if timer.full_flops / rate > seconds:
        return rate
    timer.grow()
    while True:
        rate = max(rate, timer.rate())
        if time.perf_counter() - started > seconds:
            return rate


class _Matmul:
    """x W^T of random numbers (a GPU multiplies constants faster, since fewer bits change), small at first.

    Attributes:
        full_flops: of the matmul after `grow`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        tokens, self.width, self.out = _CPU_SHAPE if device.type == "cpu" else _GPU_SHAPE
        self.full_flops = 2.0 * tokens * self.width * self.out
        self._make(tokens // 16)
        self.seconds()  # libraries set themselves up in the first call

    def grow(self) -> None:
        """Take the full size, 16 times as many tokens, from now on."""
        if self.flops < self.full_flops:
            self._make(16 * len(self.x))

    def _make(self, tokens: int) -> None:
        self.x, self.weight = (
            torch.randn(rows, self.width, device=self.device).to(self.dtype) for rows in (tokens, self.out)
        )
        self.product = torch.empty(tokens, self.out, dtype=self.dtype, device=self.device)
        self.flops = 2.0 * tokens * self.width * self.out

    def rate(self) -> float:
        """Floating-point operations per second of one more matmul."""
        return self.flops / max(self.seconds(), 1e-9)

    @torch.no_grad()
    def seconds(self) -> float:
        """Of one matmul; on a GPU the mean of _GPU_REPEATS by its own clock."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_GPU_REPEATS):
                torch.mm(self.x, self.weight.t(), out=self.product)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / _GPU_REPEATS
        _synchronize(self.device)
        started = time.perf_counter()
        torch.mm(self.x, self.weight.t(), out=self.product)
        _synchronize(self.device)
        return time.perf_counter() - started


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


def describe_device(device: torch.device) -> dict[str, str | int]:
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


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory: you tried to allocate")
"""What PyTorch's allocators say: on a GPU, on a CPU, and on a CPU under Windows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and any(phrase in words for phrase in OUT_OF_MEMORY)
