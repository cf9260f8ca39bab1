"""Trying the GPU's attention kernels before they are used: they depend on the GPU, its driver and PyTorch's version.

Each kernel computes small random rows of the model's own kinds of attention (heads, widths, window, soft cap, sinks),
forward and backward: a prefix tree, separate segments, and segments of one length. It is not used where it fails or
differs from the plain way (tunery.fast.attention_gpu.refusals says why).

This happens between two batches, never in a layer: a layer whose activations are recomputed must do the same operations
both times (torch.utils.checkpoint counts the tensors that are kept).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tunery.data.batching import Group, Row, pack
from tunery.fast import attention_gpu
from tunery.fast.attention_gpu import (
    NAMES,
    AttentionCase,
    GpuLayout,
    Kernel,
    by_equal_lengths,
    fits,
    kernels_for,
)
from tunery.fast.attention_rule import Rule
from tunery.fast.trial import relative_difference

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest relative difference from the plain way that rounding explains; a wrong mask gives 0.1 and more. In float32 a
GPU may multiply in TF32."""

WINDOW = 70
"""Where layers have a window, that of a trial: less than its rows."""

TIMED_ROWS, TIMED_LENGTH, TIMINGS = 4, 2048, 7
"""Segments, their length and how often each kernel computes them, where two are compared."""

FASTER = 0.95
"""cuDNN's attention is used if it takes at most this part of the other kernel's time."""

Plain = Callable[[Tensor, Tensor, Tensor, Rule, Sequence[Group]], Tensor]
"""(q, k, v, rule, groups) → [H, T, E] on any device, by plain operations."""

_postponed: set[tuple[object, ...]] = set()
"""(kernel, *kind) of those that memory ran out for while they were timed."""


def _groups(shape: str) -> tuple[Group, ...]:
    """A row of 300 to 500 tokens, no whole number of blocks."""
    rng = np.random.default_rng(0)

    def row(*parts: np.ndarray) -> Row:
        ids = np.concatenate([*parts, [0]]).astype(np.int32)  # a row's last token is not computed
        return Row(ids, np.ones(len(ids), np.float32))

    def tokens(count: int) -> np.ndarray:
        return rng.integers(1, 1000, count)

    if shape == "tree":
        stem, branch = tokens(150), tokens(45)
        parts = [(stem, tokens(60)), (stem, branch, tokens(33)), (stem, branch, tokens(81)), (tokens(97),)]
    elif shape == "separate":
        parts = [(tokens(count),) for count in (37, 205, 1, 160)]
    else:
        parts = [(tokens(115),) for _ in range(4)]
    return tuple(pack([row(*each) for each in parts], share=shape == "tree").groups)


SHAPES = ("tree", "separate", "one length")
"""Of the rows in a trial."""


def try_kernels(plain: Plain) -> None:
    """Try all kernels on the kinds of attention that were met without (attention_gpu.attend notes them).

    Raises:
        torch.OutOfMemoryError: there is not even memory for a trial; it may be done again.
    """
    if not attention_gpu._untried:
        return
    while attention_gpu._untried:
        kind, window = next(iter(attention_gpu._untried.items()))
        with torch.inference_mode(False), torch.enable_grad():
            for kernel in reversed(kernels_for(kind)):  # by_equal_lengths is compared with one that is known to work
                key = (kernel, *kind)
                if key not in attention_gpu._tried:
                    attention_gpu._tried[key] = _why_not(kernel, kind, window, plain)
        del attention_gpu._untried[kind]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what is computed at a time is decided by the memory that is free


def try_postponed_again() -> None:
    """Try kernels again that could not be timed because memory ran out: another model is in memory now."""
    for key in _postponed:
        attention_gpu._tried.pop(key, None)
    _postponed.clear()


def _why_not(kernel: Kernel, kind: AttentionCase, window: int | None, plain: Plain) -> str | None:
    for shape in SHAPES:
        groups = _groups(shape)
        layout = GpuLayout(groups, kind.device)
        if fits(kernel, layout, WINDOW if kind.windowed else None) and (why := _try(kernel, kind, layout, plain)):
            return why
    return _slower(kernel, kind, window) if kernel is by_equal_lengths else None


def _inputs(kind: AttentionCase, tokens: int) -> tuple[list[Tensor], Rule]:
    """Random q, k and v [T, heads, width] with gradients, and the rule. Models give them so, by token first."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind.device, kind.dtype)

    shapes = ((kind.heads, kind.width), (kind.kv_heads, kind.width), (kind.kv_heads, kind.value_width))
    sinks = random(kind.heads) if kind.sinks else None
    rule = Rule(kind.scale, WINDOW if kind.windowed else None, kind.softcap, sinks)
    return [random(tokens, *shape).requires_grad_() for shape in shapes], rule


def _slope(kind: AttentionCase, tokens: int, dtype: torch.dtype) -> Tensor:
    """∂L/∂output, [H, T, E], by token first too."""
    shape = tokens, kind.heads, kind.value_width
    return torch.linspace(-1, 1, math.prod(shape), device=kind.device).view(shape).to(dtype).transpose(0, 1)


def _run(compute: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    """The output [H, T, E] and the gradients of inputs [T, heads, width]."""
    q, k, v = (x.transpose(0, 1) for x in inputs)
    out = compute(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, inputs, slope)]


def _try(kernel: Kernel, kind: AttentionCase, layout: GpuLayout, plain: Plain) -> str | None:
    """Compute both ways, with gradients, and compare; None if they agree. Sinks belong to the frozen base."""
    tokens = layout.groups[-1].stop
    inputs, rule = _inputs(kind, tokens)
    wide = torch.promote_types(kind.dtype, torch.float32)
    wide_rule = rule if rule.sinks is None else rule._replace(sinks=rule.sinks.to(wide))
    wanted = _run(
        lambda q, k, v: plain(q, k, v, wide_rule, layout.groups),
        [x.detach().to(wide).requires_grad_() for x in inputs],
        _slope(kind, tokens, wide),
    )
    try:
        with torch.no_grad():  # for which a compiler makes another kernel
            q, k, v = (x.transpose(0, 1) for x in inputs)
            alone = kernel(q, k, v, layout, rule)
        got = _run(lambda q, k, v: kernel(q, k, v, layout, rule), inputs, _slope(kind, tokens, kind.dtype))
    except Exception as error:  # whatever a compiler or a driver may raise
        _raise_if_out_of_memory(error)
        first = str(error).strip().partition("\n")[0][:200]
        why = f"{type(error).__name__}: {first}"
        return f"{NAMES[kernel]} does not run on this GPU ({why}); attention is slower without it"
    worst = max(relative_difference(a, b, floor=1e-6) for a, b in zip([*got, alone], [*wanted, wanted[0]], strict=True))
    if worst <= TOLERANCE[kind.dtype]:
        return None
    how = f"differs by {worst:.1%} from the plain computation" if math.isfinite(worst) else "gives NaN or infinity"
    return f"{NAMES[kernel]} {how} on this GPU and is not used; attention is slower"


def _raise_if_out_of_memory(error: BaseException) -> None:
    """A compiler wraps what its kernels raise while it tries them."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower():
        raise torch.OutOfMemoryError(str(error)) from error


# --------------------------------------------------------------------------- which one is faster


def _slower(kernel: Kernel, kind: AttentionCase, window: int | None) -> str | None:
    """None if the kernel is faster than the one that would be used instead, on rows as long as real ones."""
    if window is not None and window < TIMED_LENGTH:
        return "the window is shorter than most rows"
    others = [k for k in kernels_for(kind) if k is not kernel and attention_gpu._tried.get((k, *kind), "") is None]
    if not others:
        return None
    try:
        mine, other = _times((kernel, others[0]), kind)
    except torch.OutOfMemoryError:
        _postponed.add((kernel, *kind))
        return "memory ran out while it was timed"
    if mine <= FASTER * other:
        return None
    return f"{NAMES[kernel]} takes {mine:.2f} ms where {NAMES[others[0]]} takes {other:.2f} ms"


def _times(kernels: Sequence[Kernel], kind: AttentionCase) -> list[float]:
    """Median milliseconds of each, forward and backward, in turns."""
    rows = [
        Row(np.full(TIMED_LENGTH + 1, i, np.int32), np.ones(TIMED_LENGTH + 1, np.float32)) for i in range(TIMED_ROWS)
    ]
    layout = GpuLayout(tuple(pack(rows, share=False).groups), kind.device)
    inputs, rule = _inputs(kind, TIMED_ROWS * TIMED_LENGTH)
    slope = _slope(kind, TIMED_ROWS * TIMED_LENGTH, kind.dtype)
    rule = rule._replace(window=None)
    found: dict[Kernel, list[float]] = {kernel: [] for kernel in kernels}
    for _ in range(TIMINGS):
        for kernel, times in found.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            _run(lambda q, k, v, kernel=kernel: kernel(q, k, v, layout, rule), inputs, slope)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return [statistics.median(times[2:]) for times in found.values()]  # the first plans and compiles
