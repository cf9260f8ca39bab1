"""What the machine is, and how fast it multiplies and copies."""

from __future__ import annotations

import functools
import os
import platform

import torch
import transformers

from bench.gpu_check.check import Check

PRODUCTS = (
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (8188, 4096, 4096),
    (8188, 4096, 1024),
    (8188, 4096, 6144),
    (8188, 4096, 14336),
    (8188, 14336, 4096),
    (8188, 4112, 14336),
    (2047, 4096, 1024),
    (2047, 4096, 6144),
    (2047, 4096, 14336),
    (1024, 4096, 128256),
)
"""(tokens, in, out) of the layers of an 8B model, four rows and one; the first is the rate that shares refer to."""


def facts(check: Check) -> None:
    """Versions and device; FLOP/s of products, bytes/s of a copy, and the rate that tunery itself finds."""
    from tunery.models.device import matmul_rate, probe_precision

    gpu = check.device.type == "cuda"
    check.say(
        "facts",
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        cpus=os.cpu_count(),
        gpu=torch.cuda.get_device_name() if gpu else None,
        capability=torch.cuda.get_device_capability() if gpu else None,
        memory=torch.cuda.mem_get_info() if gpu else None,
    )
    for size in PRODUCTS:
        check.attempt("product", functools.partial(_product, check, *size))
    check.attempt("copy", functools.partial(_copy, check))
    rate, choice = matmul_rate(check.device, torch.bfloat16, 0.3), probe_precision(check.device).choice
    check.say("tunery's own rate", tflops=_tera(rate), choice=str(choice))


def _product(check: Check, m: int, k: int, n: int) -> None:
    check.say("product", mkn=[m, k, n], tflops=_tera(check.product_rate(m, k, n)))


def _copy(check: Check) -> None:
    source = check.noise(1 << (20 if check.tiny else 30))
    target = torch.empty_like(source)
    seconds = check.timed(lambda: target.copy_(source))
    check.say("copy", TB_s=round(2 * source.nbytes / seconds / 1e12, 4))


def _tera(rate: float) -> float:
    """Significant also for a CPU."""
    return float(f"{rate / 1e12:.4g}")
