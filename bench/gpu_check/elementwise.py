"""The element-wise parts of a layer: as they are written, compiled by themselves, and what memory allows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_check import islands as written
from bench.gpu_check.check import Check, milliseconds
from tunery.models.lean import _RMSNorm

Case = tuple[Callable[..., Any], tuple[Tensor, ...], int]
"""A function, its arguments, and the fewest bytes that it must read and write."""


def islands(check: Check) -> None:
    """Milliseconds of each, eager and compiled; GB/s of the fewest bytes; difference from float64."""
    for name, (function, arguments, least) in cases(check).items():
        check.attempt(f"island {name}", functools.partial(_island, check, name, function, arguments, least))
    check.attempt("island", lambda: _norms(check))


def cases(check: Check) -> dict[str, Case]:
    """The parts of an 8B layer over four rows, in bfloat16."""
    tokens, width, hidden, head, vocabulary, predicted = (
        (64, 64, 128, 32, 512, 8) if check.tiny else (8188, 4096, 14336, 128, 128_256, 1024)
    )
    noise = check.noise
    x, grad, weight = noise(tokens, width), noise(tokens, width), noise(width)
    gate, up, slope = (noise(tokens, hidden) for _ in range(3))
    q, k = noise(tokens, width // head, head), noise(tokens, 8, head)
    angle = noise(tokens, head // 2)
    scale = torch.rand(tokens, 1, device=check.device)
    logits = noise(predicted, vocabulary)
    target = torch.randint(0, vocabulary, (predicted,), device=check.device)
    ones = torch.ones(predicted, device=check.device)
    return {
        "rmsnorm": (written.rms_norm, (x, weight), 2 * x.nbytes),
        "rmsnorm backward + residual": (written.rms_norm_backward, (grad, x, weight, scale, grad), 4 * x.nbytes),
        "gated unit": (written.gated, (gate, up), 3 * gate.nbytes),
        "gated unit backward": (written.gated_backward, (slope, gate, up), 6 * gate.nbytes),
        "rotation": (written.rotate, (q, k, angle, angle), 2 * (q.nbytes + k.nbytes)),
        f"cross-entropy of {predicted} rows": (written.cross_entropy, (logits, target, ones), 3 * logits.nbytes),
    }


@torch.no_grad()
def _island(check: Check, name: str, function: Callable[..., Any], arguments: tuple[Tensor, ...], least: int) -> None:
    fused = function if check.tiny else torch.compile(function, dynamic=True)
    started = time.perf_counter()
    got = _as_tuple(fused(*arguments))
    compiling = check.since(started)
    wanted = _as_tuple(function(*(x.double() if x.is_floating_point() else x for x in arguments)))
    eager_seconds, fused_seconds = check.timed(lambda: function(*arguments)), check.timed(lambda: fused(*arguments))
    check.say(
        "island",
        name=name,
        compile_s=compiling,
        eager_ms=milliseconds(eager_seconds, 3),
        fused_ms=milliseconds(fused_seconds, 3),
        fused_GB_s=round(least / fused_seconds / 1e9, 2),
        off=max(_difference(a, b) for a, b in zip(got, wanted, strict=True)),
    )


def _norms(check: Check) -> None:
    """RMSNorm forward and backward: tunery's, and PyTorch's own kernel."""
    tokens, width = (64, 64) if check.tiny else (8188, 4096)
    x, grad, weight = check.noise(1, tokens, width).requires_grad_(), check.noise(1, tokens, width), check.noise(width)
    ways: dict[str, Callable[[], Any]] = {
        "tunery's rmsnorm, both ways": lambda: _RMSNorm.apply(x, weight, written.EPS, False),
        "PyTorch's rmsnorm, both ways": lambda: F.rms_norm(x, (width,), weight, written.EPS),
    }
    for name, way in ways.items():
        seconds = check.timed(functools.partial(_backward, way, x, grad))
        check.say("island", name=name, eager_ms=milliseconds(seconds, 3))


def _backward(way: Callable[[], Tensor], x: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(way(), x, grad)


def _as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
