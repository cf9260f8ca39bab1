"""Cross-entropy summed over trained tokens, computed at the predicting positions only.

The head of a LoRA run is frozen: its weights need no gradient. So the gradient of the loss with respect to the hidden
states is taken in the forward pass, chunk by chunk, and no more than one chunk of logits ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunery.data.batching import FlatBatch, Row, flatten, micro_batches
from tunery.models.flat import FlatModel, Head
from tunery.models.memory import LOGIT_PARTS, logit_chunk
from tunery.training.guard import is_out_of_memory, out_of_memory_with_one_row

EVALUATION_TOKENS = 4096
"""Computed tokens per batch where nothing is kept for a backward pass."""


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


def _piece(
    logits: Tensor, head: Head, local: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a few rows of raw logits [n, V] with N things to predict, at rows `local`: negative log-likelihoods [N],
    which are the most likely token [N], and the gradient of Σ weights · nll with respect to scale · logits [n, V].

    The sum in the softmax is read off its largest share, 1 / Σ exp(z − max z): on a CPU `logsumexp` takes 15 times as
    long.
    """
    z = head.finish(logits)
    top, first = z.max(dim=-1)
    share = torch.softmax(z, dim=-1)
    log_total = top - share.amax(dim=-1).log_()
    each = log_total[local] - z[local, targets]
    delta = share.mul_(torch.zeros_like(top).index_add_(0, local, weights)[:, None])
    delta.index_put_((local, targets), -weights, accumulate=True)
    if head.softcap is not None:
        delta *= 1 - (z / head.softcap).square_()
    return each, first[local] == targets, delta


class _FrozenHeadLoss(torch.autograd.Function):
    """Σ w · −log softmax(head(x))[target] for a frozen head, with ∂/∂x computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, entry: Tensor, targets: Tensor, weights: Tensor, bounds: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer = head.frozen
        assert layer is not None
        weight, rows = layer.weight, chunk_rows(layer.weight)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        each = torch.empty(len(entry), dtype=wide, device=hidden.device)
        right = torch.empty(len(entry), dtype=torch.bool, device=hidden.device)
        room = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            stop = min(start + rows, len(hidden))
            logits = torch.mm(hidden[start:stop], weight.t(), out=room[: stop - start])
            if layer.bias is not None:
                logits += layer.bias
            for first in range(start, stop, rows // LOGIT_PARTS or 1):
                last = min(first + (rows // LOGIT_PARTS or 1), stop)
                part, on = logits[first - start : last - start], slice(int(bounds[first]), int(bounds[last]))
                each[on], right[on], delta = _piece(part, head, entry[on] - first, targets[on], weights[on].to(wide))
                if grad is not None:
                    part.copy_(delta)  # the logits are no longer needed
            if grad is not None:
                torch.mm(logits, weight, out=grad[start:stop])
        if grad is not None and head.scale != 1.0:
            grad *= head.scale
        if grad is not None:
            ctx.save_for_backward(grad)
        total = (each * weights.to(wide)).sum()
        correct = (weights * right).sum()  # no index by `right`: the GPU would have to say how many there are
        ctx.mark_non_differentiable(correct, each)
        return total, correct, each

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * gradients[0].to(grad.dtype), None, None, None, None, None


def _loss_of_logits(logits: Tensor, entry: Tensor, targets: Tensor, weights: Tensor) -> BatchLoss:
    """The same by autograd, where the head is adapted or is the model's own affair. logits [S, V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = torch.logsumexp(logits, dim=-1)[entry] - logits[entry, targets]
    correct = (weights * (logits.detach().argmax(dim=-1)[entry] == targets)).sum()
    return BatchLoss((each * weights.to(logits.dtype)).sum(), correct, each.detach())


def batch_loss(model: FlatModel, batch: FlatBatch) -> BatchLoss:
    """The summed loss of a micro-batch; divide by the trained weight of the whole optimizer step, once."""
    entry, targets, weights = (model.tensor(x) for x in (batch.entry, batch.targets, batch.weights))
    if model.head is None:
        return _loss_of_logits(model.logits(batch), entry, targets, weights)
    hidden = model.hidden(batch)
    if model.head.frozen is None:
        return _loss_of_logits(model.head.logits(hidden), entry, targets, weights)
    bounds = np.searchsorted(batch.entry, np.arange(len(batch.sources) + 1))
    return BatchLoss(*_FrozenHeadLoss.apply(hidden, model.head, entry, targets, weights, bounds))  # type: ignore[misc]


def batches_of(
    model: FlatModel, rows: Sequence[Row], max_rows: int | None = None, max_tokens: int | None = None
) -> Iterator[FlatBatch]:
    """The rows as flattened micro-batches within both limits; one row at a time where the model needs that."""
    limit = (max_rows or len(rows)) if model.flattened else 1
    for part in micro_batches(rows, limit, max_tokens):
        yield flatten(part)


def _losses(model: FlatModel, rows: Sequence[Row]) -> Iterator[tuple[list[Row], FlatBatch, BatchLoss]]:
    """Losses of all rows without gradients; where memory runs out, a batch is halved and tried again."""
    waiting = list(micro_batches(rows, len(rows) if model.flattened else 1, EVALUATION_TOKENS))[::-1]
    while waiting:
        part = waiting.pop()
        batch = flatten(part)
        try:
            yield part, batch, batch_loss(model, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise out_of_memory_with_one_row() from error
            waiting += [part[len(part) // 2 :], part[: len(part) // 2]]


@torch.no_grad()
def score_rows(model: FlatModel, rows: Sequence[Row]) -> np.ndarray:
    """Log-probability (nats) of each row's trained tokens, summed; one chunk of logits at a time. float64 [rows]."""
    scores = np.zeros(len(rows))
    found: list[tuple[np.ndarray, Tensor]] = []
    numbered = [replace(row, example=number) for number, row in enumerate(rows)]
    for part, batch, loss in _losses(model, numbered):
        where = np.asarray([row.example for row in part])[batch.owners]
        found.append((where, loss.each))
    for where, each in found:  # read only now: each reading waits for the device
        np.add.at(scores, where, -each.cpu().double().numpy())
    return scores


@torch.no_grad()
def mean_loss(model: FlatModel, rows: Sequence[Row]) -> tuple[float, float]:
    """Mean loss per trained token, and the share of trained tokens that were the model's first choice."""
    weight = 0.0
    sums: list[tuple[Tensor, Tensor]] = []
    for _, batch, loss in _losses(model, rows):
        sums.append((loss.total, loss.correct))
        weight += float(batch.weights.sum())
    # read only now: each reading waits for the device
    total, correct = (sum(torch.stack(column).tolist()) for column in zip(*sums, strict=True))
    return total / weight, correct / weight
