"""Attention over one flattened row on a GPU, in one kernel for all segments.

Where no prefix is shared, variable-length flash attention (Dao 2023, arXiv:2307.08691) through
torch.nn.attention.varlen. Otherwise, and for soft caps and sinks, FlexAttention (Dong et al. 2024, arXiv:2412.05496)
with a block mask made from the prefix tree. What is needed for both is made once a batch and used by every layer.

Each way of computing is tried on the first rows of a run against the plain way, forward and backward, and not used
where it fails or differs (`refusals` says why): these kernels depend on the GPU and on PyTorch's version.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from tunery.data.batching import Group
from tunery.models.device import on_device
from tunery.models.tree_mask import Tree, block_pattern, tree_of

BLOCK = 128
"""Rows and columns of a block of the mask, FlexAttention's own default."""

SHORTEST = 2 * BLOCK
"""Shorter rows are padded to this inside attention. PyTorch compiles a kernel of its own for fewer than 128 queries,
and one more for a mask of a single block."""

FLASH_DTYPES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest relative difference from the plain way that rounding explains; a wrong mask gives 0.1 and more. In float32 a
GPU may multiply in TF32."""

Plain = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Rule(NamedTuple):
    """How scores become weights: scale, sliding window in tokens, soft cap (Gemma 2), sinks [H] (gpt-oss)."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class GpuLayout:
    """A flattened row's metadata on the GPU, each part made when a layer first asks for it.

    Args:
        groups: of the batch (tunery.data.batching.FlatBatch.groups).
    """

    def __init__(self, groups: Sequence[Group], device: torch.device):
        self.groups, self.device = groups, device
        self.shared = any(len(group.path) for group in groups)
        self._masks: dict[int | None, BlockMask] = {}
        self._numbers: dict[float, Tensor] = {}

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each segment where none shares a prefix. int64 [rows]."""
        return np.concatenate([np.asarray(group.lengths) for group in self.groups])

    @functools.cached_property
    def edges(self) -> Tensor:
        """Where each segment starts, and the end: int32 [rows + 1]."""
        return on_device(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32), self.device)

    @functools.cached_property
    def tree(self) -> Tree:
        """Of the tokens, padded to SHORTEST."""
        tree = tree_of(self.groups)
        return tree.padded(max(SHORTEST, len(tree.enter)))

    @functools.cached_property
    def tree_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """`enter`, `end` and `position` of the tree, int32 [T]."""
        return tuple(on_device(x, self.device) for x in (self.tree.enter, self.tree.end, self.tree.position))  # type: ignore[return-value]

    def number(self, value: float) -> Tensor:
        """A float32 scalar on the device."""
        if value not in self._numbers:
            self._numbers[value] = on_device(np.asarray(value, np.float32), self.device)
        return self._numbers[value]

    def block_mask(self, window: int | None) -> BlockMask:
        """The mask for FlexAttention, one for each sliding window among the layers."""
        if window not in self._masks:
            wide = len(self.tree.enter) if window is None else window
            limit = on_device(np.asarray(wide, np.int32), self.device)
            self._masks[window] = _block_mask(self.tree, window, _sees(*self.tree_tensors, limit), self.device)
        return self._masks[window]


def _sees(enter: Tensor, end: Tensor, position: Tensor, window: Tensor) -> Callable[..., Tensor]:
    """tunery.models.tree_mask's formula as FlexAttention wants it. The window is a tensor, so that layers with and
    without one share a kernel."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (enter[key] <= enter[query]) & (enter[query] < end[key])
        back = position[query] - position[key]
        return inside & (back >= 0) & (back < window)

    return sees


def _block_mask(tree: Tree, window: int | None, sees: Callable[..., Tensor], device: torch.device) -> BlockMask:
    parts = []
    for blocks in block_pattern(tree, window, BLOCK):
        for rows in (blocks, blocks.T):  # by queries, and by keys for the backward pass
            counts = rows.sum(axis=1, dtype=np.int32)
            order = np.argsort(~rows, axis=1, kind="stable").astype(np.int32)
            parts += [on_device(counts[None, None], device), on_device(order[None, None], device)]
    counts, order, by_key_counts, by_key_order, full, full_order, by_key_full, by_key_full_order = parts
    length = len(tree.enter)
    for part in parts:
        _vary(part, *range(2, part.dim()))
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=counts,
        kv_indices=order,
        full_kv_num_blocks=full,
        full_kv_indices=full_order,
        q_num_blocks=by_key_counts,
        q_indices=by_key_order,
        full_q_num_blocks=by_key_full,
        full_q_indices=by_key_full_order,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )


def _vary(tensor: Tensor, *dims: int) -> None:
    """Tell the compiler that these sizes differ from batch to batch, so that it does not compile one kernel each."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


# --------------------------------------------------------------------------- kernels


@functools.cache
def _compiled() -> Any:
    """FlexAttention as one kernel; without the compiler it would build all T x T scores of every head."""
    return torch.compile(flex_attention, fullgraph=True)


def _softcap(cap: Tensor) -> Callable[..., Tensor]:
    """Gemma 2's cap · tanh(score / cap). A tensor: the compiler refuses numbers that differ between models."""

    def cap_score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return cap_score


def by_tree(q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule, flex: Any = None) -> Tensor:
    """Attention of all segments through FlexAttention. q [H, T, D], k [G, T, D], v [G, T, E] → [H, T, E].

    A sink takes part in the softmax and adds nothing: softmax over [scores, sink] is the plain softmax times
    sigmoid(logsumexp(scores) - sink), so it is put on afterwards.

    Args:
        flex: FlexAttention as it is to be called; compiled, if left out.
    """
    length, width = q.shape[1], len(layout.tree.enter)
    if width > length:
        q, k, v = (F.pad(x, (0, 0, 0, width - length)) for x in (q, k, v))
    q, k, v = q[None], k[None], v[None]
    for x in (q, k, v, *layout.tree_tensors):
        _vary(x, 2 if x.dim() == 4 else 0)
    out, aux = (flex or _compiled())(
        q,
        k,
        v,
        score_mod=None if rule.softcap is None else _softcap(layout.number(rule.softcap)),
        block_mask=layout.block_mask(rule.window),
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=rule.sinks is not None),
    )
    out = out[0, :, :length]
    if rule.sinks is not None:
        weight = torch.sigmoid(aux.lse[0, :, :length] - rule.sinks.to(aux.lse.dtype)[:, None])
        out = out * weight[..., None].to(out.dtype)
    return out


def by_lengths(q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule) -> Tensor:
    """Attention of separate segments through variable-length flash attention; shapes as `by_tree`."""
    longest = int(layout.lengths.max())
    # Flash attention counts the tokens left of the query; (-1, 0) is its plain causal mask.
    left = -1 if rule.window is None or rule.window >= longest else rule.window - 1
    more: dict[str, Any] = {"enable_gqa": q.shape[0] != k.shape[0]} if _FLASH_ASKS_FOR_GROUPS else {}
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = varlen_attn(
        q, k, v, layout.edges, layout.edges, longest, longest, scale=rule.scale, window_size=(left, 0), **more
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)


_FLASH_ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""PyTorch 2.11 takes fewer key heads than query heads without being told."""


# --------------------------------------------------------------------------- which one


Kernel = Callable[[Tensor, Tensor, Tensor, GpuLayout, Rule], Tensor]


def kernels(q: Tensor, v: Tensor, layout: GpuLayout, rule: Rule) -> list[Kernel]:
    """What can compute these shapes, the fastest first. Nothing for float64, and for heads under 16 numbers wide."""
    width, value_width = q.shape[-1], v.shape[-1]
    flash = (
        not layout.shared
        and rule.softcap is None
        and rule.sinks is None
        and q.dtype in FLASH_DTYPES
        and width == value_width <= 256
        and width % 8 == 0
    )
    found: list[Kernel] = []
    if flash and torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 0):
        found.append(by_lengths)
    if q.dtype in TOLERANCE and min(width, value_width) >= 16:
        found.append(by_tree)
    return found


_tried: dict[tuple[Any, ...], str | None] = {}
"""By kernel and shape: None if it agreed with the plain way, else what was wrong."""


def refusals() -> list[str]:
    """Kernels that were tried in this process and are not used, with the reason, each as a sentence."""
    return list(dict.fromkeys(reason for reason in _tried.values() if reason))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule, plain: Plain) -> Tensor | None:
    """Attention of all segments: q [H, T, D], k [G, T, D], v [G, T, E] → [H, T, E].

    Args:
        plain: the plain way of computing the same from (q, k, v, sinks).

    Returns:
        None where the plain way has to be used.
    """
    for kernel in kernels(q, v, layout, rule):
        if not _refused(kernel, q, k, v, layout, rule, plain):
            return kernel(q, k, v, layout, rule)
    return None


def _refused(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule, plain: Plain) -> bool:
    """Whether the kernel must not be used for such shapes; tried out when they first come."""
    shape = (q.shape[0], k.shape[0], q.shape[-1], v.shape[-1])
    key = (kernel, q.dtype, q.device, shape, rule.window is None, rule.softcap, rule.sinks is None)
    if key not in _tried:
        _tried[key] = _try(kernel, q, k, v, layout, rule, plain)
    return _tried[key] is not None


def _try(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule, plain: Plain) -> str | None:
    """Compute both ways, with gradients, and compare; None if they agree. Sinks belong to the frozen base."""
    name = "flash attention" if kernel is by_lengths else "FlexAttention"

    def run(compute: Callable[..., Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            own = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            out = compute(*own)
            slope = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float32).view(out.shape)
            return [out.detach(), *torch.autograd.grad(out, own, slope.to(out.dtype))]

    try:
        got = run(lambda q, k, v: kernel(q, k, v, layout, rule))
        wanted = run(lambda q, k, v: plain(q, k, v, rule.sinks))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver may raise
        first = str(error).strip().partition("\n")[0][:200]
        return f"{name} does not run on this GPU ({type(error).__name__}: {first}); attention is slower without it"
    worst = max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-6))
        for a, b in zip(got, wanted, strict=True)
    )
    if worst <= TOLERANCE[q.dtype]:
        return None
    return f"{name} differs by {worst:.1%} from the plain computation on this GPU and is not used; attention is slower"
