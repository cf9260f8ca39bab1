"""Whether two greedy answers differ only where rounding decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.15}
"""Largest gap between two logits, as a share of the spread of all at that place, that rounding may turn round."""


@torch.no_grad()
def gap_at_first_difference(
    model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]
) -> float | None:
    """How far apart the model holds the first two tokens that differ: |difference of logits| / spread of all logits.

    Args:
        model: computes plain rows, with the adapter active that both answers are of.

    Returns:
        None where the answers are equal, as far as the shorter one goes.
    """
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if place is None:
        return None
    row = torch.tensor([[*prompt, *one[:place]]], device=model.device)
    logits = model(input_ids=row, use_cache=False).logits[0, -1].double()
    return float((logits[one[place]] - logits[other[place]]).abs() / logits.std())


def assert_same_up_to_rounding(model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> None:
    """Two greedy answers to one prompt are equal, or part at a near-tie."""
    gap = gap_at_first_difference(model, prompt, one, other)
    assert gap is None or gap <= ROUNDING[model.dtype], f"the answers part where the logits are {gap:.3f} apart"
    if gap is None:
        assert len(one) == len(other)
