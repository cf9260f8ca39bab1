"""What a layer's attention is besides its queries, keys and values: which keys a query sees, and how scores become
weights. Sliding windows, soft caps (Gemma 2, arXiv:2408.00118, section 2) and attention sinks (gpt-oss) stand here,
whoever computes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Array = TypeVar("Array", np.ndarray, Tensor)
Given = TypeVar("Given")


class Rule(NamedTuple):
    """How a layer's scores become weights.

    Attributes:
        scale: scores are scale · q k.
        window: how many keys a query sees, its own included; None for all before it.
        softcap: scores become softcap · tanh(score / softcap).
        sinks: [H], score of one more key, which has no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def in_reach(query: Array, key: Array, window: int | Array | None) -> Array:
    """Where a query sees a key of its own row: none after it, and none before its window.

    Args:
        query, key: positions in the row, of shapes that broadcast.
    """
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where `seen`, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def capped(products: Tensor, rule: Rule) -> Tensor:
    """Scores with the rule's soft cap from products q k, in place."""
    assert rule.softcap is not None
    return products.mul_(rule.scale / rule.softcap).tanh_().mul_(rule.softcap)


def attention_weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys, and the sink if there is one, whose own weight is left out: [..., queries, keys].

    Args:
        sinks: [..., queries, 1], in the dtype of the scores.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


def attention_function(
    keyword: str, attend: Callable[[Given, Tensor, Tensor, Tensor, Rule], Tensor]
) -> Callable[..., tuple[Tensor, None]]:
    """A function for transformers' attention interface, over one packed sequence.

    Args:
        keyword: the name under which the model is given what `attend` needs to know of the sequence.
        attend: (that, q [H, T, D], k [G, T, D], v [G, T, E], rule) → [T, H, E].
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        *,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **given: Given,
    ) -> tuple[Tensor, None]:
        """query [1, H, T, D], key and value [1, G, T, D] → ([1, T, H, D], None)."""
        rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
        # x[0] would fill a tensor with zeros in the backward pass
        q, k, v = (x.squeeze(0) for x in (query, key, value))
        return attend(given[keyword], q, k, v, rule)[None], None

    return attention
