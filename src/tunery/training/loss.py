"""Cross-entropy summed over trained tokens, computed at the predicting positions only.

The head of a LoRA run is frozen: its weights need no gradient. So the gradient of the loss with respect to the hidden
states is taken in the forward pass, chunk by chunk, and no more than one chunk of logits ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunery.data.batching import PackedBatch
from tunery.fast.islands import softmax_gradient, softmax_sums
from tunery.fast.packed_model import OutputHead, PackedModel
from tunery.models.autograd import Context, apply
from tunery.training.memory import LOGIT_PARTS, logit_chunk


@dataclass(frozen=True)
class BatchLoss:
    """Of one micro-batch: the weighted sum of negative log-likelihoods (a scalar with gradient), how much weight was
    predicted right by the most likely token (no gradient), and each entry's negative log-likelihood [N] (no gradient).
    """

    total: Tensor
    correct: Tensor
    each: Tensor


def chunk_rows(weight: Tensor) -> int:
    """Predicting positions whose logits exist at the same time, for a head of weight [V, d]."""
    return max(1, logit_chunk(weight.device.type) // (weight.element_size() * len(weight)))


@dataclass(frozen=True)
class _Entries:
    """What is predicted from S hidden states: N entries, ordered by their state.

    Attributes:
        at: int64 [N], the state.
        targets: int64 [N].
        weights: float [N], in the gradient.
        bounds: int64 [S + 1], the first entry of each state.
        again: int64 [N], the first entry with the same state and target; None where no two are alike.
    """

    at: Tensor
    targets: Tensor
    weights: Tensor
    bounds: np.ndarray
    again: Tensor | None = None

    @classmethod
    def of(cls, model: PackedModel, batch: PackedBatch) -> _Entries:
        """Of a micro-batch, on the model's device."""
        bounds = np.searchsorted(batch.entry, np.arange(len(batch.sources) + 1))
        at, targets, weights = (model.tensor(x) for x in (batch.entry, batch.targets, batch.weights))
        again = _first_alike(batch) if softmax_gradient.compiles(at) else None
        return cls(at, targets, weights, bounds, None if again is None else model.tensor(again))

    def cell_weights(self, dtype: torch.dtype) -> Tensor:
        """[N], of each entry's state and target together: rows that are alike count as one that weighs as much."""
        weights = self.weights.to(dtype)
        if self.again is None:
            return weights
        return torch.zeros_like(weights).index_add_(0, self.again, weights)[self.again]


def _first_alike(batch: PackedBatch) -> np.ndarray | None:
    cells = batch.entry.astype(np.int64) * (int(batch.targets.max(initial=0)) + 1) + batch.targets
    _, first, which = np.unique(cells, return_index=True, return_inverse=True)
    return None if len(first) == len(cells) else first[which]


def _part(
    logits: Tensor, head: OutputHead, local: Tensor, targets: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a few rows of raw logits [n, V] with N things to predict, at rows `local`: negative log-likelihoods [N],
    which are the most likely token [N], and the gradient of Σ weights · nll with respect to scale · logits [n, V],
    if it is to be kept.

    The sum in the softmax is read off its largest share, 1 / Σ exp(z − max z): on a CPU `logsumexp` takes 15 times as
    long.
    """
    z = head.finish(logits)
    top, first = z.max(dim=-1)
    share = torch.softmax(z, dim=-1)
    log_total = top - share.amax(dim=-1).log_()
    each = log_total[local] - z[local, targets]
    right = first[local] == targets
    if not keep:
        return each, right, None
    delta = share.mul_(torch.zeros_like(top).index_add_(0, local, weights)[:, None])
    delta.view(-1).index_add_(0, local * len(delta[0]) + targets, weights, alpha=-1)
    if head.softcap is not None:
        delta *= 1 - (z / head.softcap).square_()
    return each, right, delta


def _whole(
    logits: Tensor, head: OutputHead, local: Tensor, targets: Tensor, weights: Tensor, cells: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `_part`, in few kernels: one pass for the sums, one for the gradient, which is then put right at the targets.

    Args:
        cells: [N], the weight of all entries with an entry's row and target.
    """
    log_total, best = softmax_sums(logits, head.scale, head.softcap)
    z = head.finish(logits[local, targets])
    total = log_total[local]
    each, right = total - z, best[local] == targets
    if not keep:
        return each, right, None
    rows = torch.zeros_like(log_total).index_add_(0, local, weights)
    delta = softmax_gradient(logits, log_total, rows, head.scale, head.softcap)
    at_targets = rows[local] * torch.exp(z - total) - cells
    if head.softcap is not None:
        at_targets = at_targets * (1 - (z / head.softcap).square())
    # Entries with one row and target bring one number, so the order of writing does not matter.
    delta.view(-1).index_copy_(0, local * logits.shape[1] + targets, at_targets.to(delta.dtype))
    return each, right, delta


def _head_pass(hidden: Tensor, head: OutputHead, entries: _Entries, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """A frozen head over hidden states [S, d], one chunk of logits at a time.

    Args:
        keep: whether the gradient is wanted.

    Returns:
        Each entry's −log softmax(head(x))[target] [N]; whether its target is the most likely token [N]; and
        ∂/∂x Σ w · −log softmax(head(x))[target] [S, d], or None.
    """
    layer = head.frozen
    assert layer is not None
    weight, rows = layer.weight, chunk_rows(layer.weight)
    bias: Tensor | None = getattr(layer, "bias", None)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    grad = torch.empty_like(hidden) if keep else None
    weights = entries.weights.to(wide)
    each = torch.empty(len(weights), dtype=wide, device=hidden.device)
    right = torch.empty(len(weights), dtype=torch.bool, device=hidden.device)
    room = hidden.new_empty(min(rows, len(hidden)), len(weight))
    whole = softmax_gradient.compiles(hidden)
    cells = entries.cell_weights(wide) if whole else weights
    step = rows if whole else rows // LOGIT_PARTS or 1
    for start in range(0, len(hidden), rows):
        stop = min(start + rows, len(hidden))
        logits = torch.mm(hidden[start:stop], weight.t(), out=room[: stop - start])
        if bias is not None:
            logits += bias
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part, on = (
                logits[first - start : last - start],
                slice(int(entries.bounds[first]), int(entries.bounds[last])),
            )
            given = (part, head, entries.at[on] - first, entries.targets[on], weights[on])
            each[on], right[on], delta = _whole(*given, cells[on], keep) if whole else _part(*given, keep)
            if delta is not None and not whole:
                part.copy_(delta)  # the logits are no longer needed
            elif delta is not None:
                logits = delta
        if grad is not None:
            torch.mm(logits, weight, out=grad[start:stop])
    if grad is not None and head.scale != 1.0:
        grad *= head.scale
    return each, right, grad


class _FrozenHeadLoss(torch.autograd.Function):
    """Σ w · −log softmax(head(x))[target] for a frozen head, with ∂/∂x computed on the way forward."""

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, head: OutputHead, entries: _Entries) -> tuple[Tensor, Tensor, Tensor]:
        each, right, grad = _head_pass(hidden, head, entries, ctx.needs_input_grad[0])
        if grad is not None:
            ctx.save_for_backward(grad)
        total = (each * entries.weights.to(each.dtype)).sum()
        correct = (entries.weights * right).sum()  # no index by `right`: the GPU would have to say how many there are
        ctx.mark_non_differentiable(correct, each)
        return total, correct, each

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * gradients[0].to(grad.dtype), None, None


class _FrozenHeadEach(torch.autograd.Function):
    """−log softmax(head(x))[target], one target for each x, with ∂/∂x computed on the way forward. [N, d] → [N]"""

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, head: OutputHead, targets: Tensor) -> Tensor:
        count = len(targets)
        own, ones = torch.arange(count, device=hidden.device), torch.ones(count, device=hidden.device)
        entries = _Entries(own, targets, ones, np.arange(count + 1))
        each, _, grad = _head_pass(hidden, head, entries, ctx.needs_input_grad[0])
        if grad is not None:
            ctx.save_for_backward(grad)
        return each

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return (grad * gradients[0][:, None]).to(grad.dtype), None, None


def _each_of_logits(logits: Tensor, entry: Tensor, targets: Tensor) -> Tensor:
    """The same by autograd, where the head is adapted or is the model's own affair. [S, V] → [N]"""
    return torch.logsumexp(logits, dim=-1)[entry] - logits[entry, targets]


def _loss_of_logits(logits: Tensor, entry: Tensor, targets: Tensor, weights: Tensor) -> BatchLoss:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = _each_of_logits(logits, entry, targets)
    correct = (weights * (logits.detach().argmax(dim=-1)[entry] == targets)).sum()
    return BatchLoss((each * weights.to(logits.dtype)).sum(), correct, each.detach())


def batch_loss(model: PackedModel, batch: PackedBatch) -> BatchLoss:
    """The summed loss of a micro-batch; divide by the trained weight of the whole optimizer step, once."""
    if model.head is None or model.head.frozen is None:
        entry, targets, weights = (model.tensor(x) for x in (batch.entry, batch.targets, batch.weights))
        logits = model.logits(batch) if model.head is None else model.head.logits(model.hidden(batch))
        return _loss_of_logits(logits, entry, targets, weights)
    hidden = model.hidden(batch)
    return BatchLoss(*apply(_FrozenHeadLoss, hidden, model.head, _Entries.of(model, batch)))


def row_log_probabilities(model: PackedModel, batch: PackedBatch, rows: int) -> Tensor:
    """Log-probability of each row's trained tokens, summed, with gradient. [rows], float32 or wider.

    Every entry has a hidden state of its own, so that the gradient of its log-probability is known on the way forward,
    before anything that is computed from the sums: the head is applied once, and no more than one chunk of logits
    exists where it is frozen.
    """
    entry, targets = model.tensor(batch.entry), model.tensor(batch.targets)
    if model.head is None or model.head.frozen is None:
        logits = model.logits(batch) if model.head is None else model.head.logits(model.hidden(batch))
        each = _each_of_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)), entry, targets)
    else:
        hidden = model.hidden(batch).index_select(0, entry)
        each: Tensor = apply(_FrozenHeadEach, hidden, model.head, targets)
    by_row = np.argsort(batch.owners, kind="stable")
    counts = np.bincount(batch.owners, minlength=rows).tolist()
    return -torch.stack([part.sum() for part in torch.split(each[model.tensor(by_row)], counts)])
