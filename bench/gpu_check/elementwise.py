"""The element-wise parts of a layer: as they are written, compiled by themselves, and what memory allows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_check.check import Check, milliseconds
from tunery.fast import islands as functions
from tunery.fast.compile import Island
from tunery.fast.fused_rmsnorm import _RMSNorm
from tunery.fast.trial import relative_difference

Case = tuple[Island[Any], tuple[Any, ...], int]
"""A function, its arguments, and the fewest bytes that it must read and write."""

EPS = 1e-5


def islands(check: Check) -> None:
    """Milliseconds of each, as it runs where nothing is compiled and compiled; GB/s of the fewest bytes; difference
    from float64."""
    for name, (function, arguments, least) in cases(check).items():
        check.attempt(f"island {name}", functools.partial(_island, check, name, function, arguments, least))
    check.attempt("island", lambda: _norms(check))


def cases(check: Check) -> dict[str, Case]:
    """The parts of an 8B layer over four rows, in bfloat16."""
    tokens, width, hidden, head, vocabulary, predicted = (
        (64, 64, 128, 32, 512, 8) if check.tiny else (8188, 4096, 14336, 128, 128_256, 1024)
    )
    noise = check.noise
    x, more, grad, weight = noise(tokens, width), noise(tokens, width), noise(tokens, width), noise(width)
    gate, up, slope = (noise(tokens, hidden) for _ in range(3))
    q, k = noise(tokens, width // head, head), noise(tokens, 8, head)
    cos, sin = noise(tokens, 1, head), noise(tokens, 1, head)
    scale = torch.rand(tokens, 1, device=check.device)
    logits = noise(predicted, vocabulary)
    total = torch.logsumexp(logits.float(), dim=-1)
    ones = torch.ones(predicted, device=check.device)
    return {
        "rmsnorm": (functions.rms_norm, (x, weight, EPS, False), 2 * x.nbytes),
        "residual sum + rmsnorm": (functions.add_rms_norm, (x, more, weight, EPS, False), 4 * x.nbytes),
        "rmsnorm backward + residual": (functions.rms_norm_backward, (grad, more, x, weight, scale), 4 * x.nbytes),
        "gated unit": (functions.gated, (gate, up, "silu"), 3 * gate.nbytes),
        "gated unit backward": (functions.gated_backward, (slope, gate, up, "silu"), 6 * gate.nbytes),
        "rotation": (functions.rotate, (q, k, cos, sin, 1), 2 * (q.nbytes + k.nbytes)),
        "softmax sums": (functions.softmax_sums, (logits, 1.0, None), logits.nbytes),
        "softmax gradient": (functions.softmax_gradient, (logits, total, ones, 1.0, None), 2 * logits.nbytes),
    }


@torch.no_grad()
def _island(check: Check, name: str, function: Island[Any], arguments: tuple[Any, ...], least: int) -> None:
    fused: Callable[..., Any] = function.written if check.tiny else torch.compile(function.written, dynamic=True)
    started = time.perf_counter()
    got = _as_tuple(fused(*arguments))
    compiling = check.since(started)
    wanted = _as_tuple(function.written(*map(_double, arguments)))
    eager_seconds = check.timed(lambda: function.eager(*arguments))  # it may use up a gradient; that takes no longer
    fused_seconds = check.timed(lambda: fused(*arguments))
    check.say(
        "island",
        name=name,
        compile_s=compiling,
        eager_ms=milliseconds(eager_seconds, 3),
        fused_ms=milliseconds(fused_seconds, 3),
        fused_GB_s=round(least / fused_seconds / 1e9, 2),
        off=max(_difference(a, b) for a, b in zip(got, wanted, strict=True) if b.is_floating_point()),
    )


def _double(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def _norms(check: Check) -> None:
    """RMSNorm forward and backward: tunery's, and PyTorch's own kernel."""
    tokens, width = (64, 64) if check.tiny else (8188, 4096)
    x, grad, weight = check.noise(1, tokens, width).requires_grad_(), check.noise(1, tokens, width), check.noise(width)
    ways: dict[str, Callable[[], Any]] = {
        "tunery's rmsnorm, both ways": lambda: _RMSNorm.apply(x, weight, EPS, False),
        "PyTorch's rmsnorm, both ways": lambda: F.rms_norm(x, (width,), weight, EPS),
    }
    for name, way in ways.items():
        seconds = check.timed(functools.partial(_backward, way, x, grad))
        check.say("island", name=name, eager_ms=milliseconds(seconds, 3))


def _backward(way: Callable[[], Tensor], x: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(way(), x, grad)


def _as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _difference(a: Tensor, b: Tensor) -> float:
    return relative_difference(a, b)
