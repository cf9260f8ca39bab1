"""Floating-point operations of the matrix products that a LoRA step needs: what the speed is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.lora.attach import base_parameters
from tunery.models.quantized import numel
from tunery.models.typed import output_embeddings
from tunery.models.windows import attention_width

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def step_flops(
    model: PreTrainedModel,
    computed_tokens: int,
    positions: int,
    adapter_parameters: int,
    passes: int = 0,
    pairs: int = 0,
    last_layer: int = 0,
    reference_parameters: int = 0,
) -> float:
    """Operations of training on a number of tokens.

    A computed token costs 2P forward and 2P for the gradient of the inputs (P: the base's matrix parameters inside the
    layers), and 6 per adapter parameter; a predicting position costs 4 per parameter of the head. Attention costs 4 per
    visible pair and number of the queries forward, 8 backward. (Counted as in PaLM, arXiv:2204.02311, appendix B, less
    the gradient of frozen weights.)

    Args:
        computed_tokens: tokens of the packed sequences.
        positions: predicting positions among them.
        adapter_parameters: trained numbers.
        passes: forward passes of the base besides.
        pairs: queries and keys that see each other, summed over the layers.
        last_layer: parameters of the base that are used at the predicting positions only (tunery.fast.last_layer).
        reference_parameters: frozen numbers of an adapter that is on in those passes.
    """
    head = output_embeddings(model)
    outside = {id(p) for m in (head, model.get_input_embeddings()) if m is not None for p in m.parameters()}
    base = base_parameters(model)
    inside = sum(numel(p) for p in base if p.dim() >= 2 and id(p) not in outside)
    head_size = 0 if head is None else sum(numel(p) for p in base_parameters(head) if p.dim() == 2)
    forward = 2.0 * (computed_tokens * (inside - last_layer) + positions * (head_size + last_layer))
    attention = 4.0 * pairs * attention_width(model.config) if pairs else 0.0
    adapters = 2.0 * computed_tokens * (3 * adapter_parameters + passes * reference_parameters)
    return (2 + passes) * forward + adapters + (3 + passes) * attention
