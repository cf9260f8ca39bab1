"""How much memory a training step takes, predicted from the model's configuration."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, TypedDict, Unpack

from torch import nn

from tunery.fast.attention import KEPT_KEYS
from tunery.fast.fused_mlp import FusedMLP, is_gated_mlp
from tunery.lora.layer import LoRALinear
from tunery.models.typed import text_config
from tunery.models.windows import AttentionHeads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LOGIT_CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of logits in the model's dtype; the loss never holds more."""

GPU_LOGIT_CHUNK_BYTES = 256 * 2**20
"""The same on a GPU, where matmuls of a few hundred rows are bound by reading the head's weights: 256 MB are 1,046 rows
of a vocabulary of 128 thousand words in bfloat16. There a chunk is taken whole, and its gradient stands beside it."""

LOGIT_PARTS = 8
"""In how many parts a chunk of logits passes through float32, so that these stay in the processor's cache."""

LOGIT_COPIES = 3
"""Of such a part: the logits in float32, their softmax, and a temporary."""

MOST_TOKENS = 1 << 24


def logit_chunk(device: str) -> int:
    """Bytes of one chunk of logits on a kind of device."""
    return LOGIT_CHUNK_BYTES if device == "cpu" else GPU_LOGIT_CHUNK_BYTES


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what they are for."""

    base: int
    adapter_and_optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.base + self.adapter_and_optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Lean:
    """Which parts of a model keep only what the gradient needs.

    Attributes:
        norms: tunery.fast.fused_rmsnorm.FusedRMSNorm, or a norm that PyTorch computes in one step.
        mlp: tunery.fast.fused_mlp.FusedMLP, with an adapter on each of its layers.
        additive: adapters are added to the base's outputs; other variants keep each layer's output in float32.
    """

    norms: bool = True
    mlp: bool = True
    additive: bool = True

    @classmethod
    def of(cls, model: nn.Module) -> Lean:
        """Of a model with adapters, whether or not its parts have been replaced yet."""
        blocks = [module for module in model.modules() if isinstance(module, FusedMLP) or is_gated_mlp(module)]
        layers = [child for block in blocks for name, child in block.named_children() if name.endswith("_proj")]
        norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
        adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
        return cls(
            additive=all(_adds(layer) for layer in adapted),
            norms=all(isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm") for m in norms),
            mlp=bool(layers) and all(isinstance(layer, LoRALinear) and _adds(layer) for layer in layers),
        )


def _adds(layer: LoRALinear) -> bool:
    return all(layer.variant(name).additive for name in layer.settings)


LEAN = Lean()


@dataclass(frozen=True)
class _Widths:
    """Numbers per token of the layer's tensors."""

    hidden: int
    layers: int
    heads: int
    query: int
    key_value: int
    feed_forward: int
    vocabulary: int
    activation_steps: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> _Widths:
        config = text_config(config)
        hidden = int(_first(config, "hidden_size", "d_model") or 0)
        heads = AttentionHeads.of(config)
        if not heads.queries:  # recurrent layers are taken for attention with one head
            heads = AttentionHeads(1, 1, int(_first(config, "head_dim") or hidden))
        feed_forward = _first(config, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
        experts = int(_first(config, "num_experts_per_tok") or 1)
        shared = int(_first(config, "shared_expert_intermediate_size") or 0)
        activation = str(_first(config, "hidden_act", "hidden_activation", "activation_function") or "")
        return cls(
            hidden=hidden,
            layers=int(_first(config, "num_hidden_layers", "n_layers") or 0),
            heads=heads.queries,
            query=heads.queries * heads.width,
            key_value=heads.keys * heads.width,
            feed_forward=experts * int(feed_forward) + shared,
            vocabulary=int(config.vocab_size),
            # gelu_new is written out in Python, and each of its steps is kept
            activation_steps=5 if activation in ("gelu_new", "gelu_fast") else 4,
        )


def _first(config: PreTrainedConfig, *names: str) -> int | str | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _layer_bytes(w: _Widths, dtype_bytes: int, keys: int, lean: Lean) -> float:
    """Bytes that one decoder layer keeps per token for the backward pass, all its linear layers adapted.

    With b bytes a number, width d, query width q, key-value width k, feed-forward width f, H heads and K keys:

    - 4 b d: input and output of both norms; 8 d more where an RMSNorm is written out in float32;
    - b (2 q + 2 k): rotated queries, keys, values, and the attention's output, which the adapter after it reads;
    - 2 b f: gate and up (tunery.fast.fused_lora.gated_mlp); 4 b f where each layer runs for itself (5 for gelu_new);
    - b H K: attention weights, where they are kept;
    - 4 (q + 2 k + 2 d + 2 f): each layer's output before it is rescaled, in float32, with a variant that does (DoRA).

    A base layer keeps nothing of its own, because its weight is frozen. The adapters' thin products (b · rank each) are
    under 2 %.
    """
    norms = 4 * dtype_bytes * w.hidden + (0 if lean.norms else 8 * w.hidden)
    feed_forward = 2 if lean.mlp else w.activation_steps
    inside = 2 * w.query + 2 * w.key_value + feed_forward * w.feed_forward + w.heads * keys
    rescaled = 0 if lean.additive else 4 * (w.query + 2 * w.key_value + 2 * w.hidden + 2 * w.feed_forward)
    return norms + dtype_bytes * inside + rescaled


def _working_bytes(w: _Widths, dtype_bytes: int) -> int:
    """Bytes a token takes in the one layer that is being computed, above what is kept: gradients and products of its
    feed-forward part, queries, keys and values in blocks, float32 in a norm."""
    return dtype_bytes * (4 * w.feed_forward + 4 * w.query + 4 * w.key_value + 2 * w.hidden) + 8 * w.hidden


class StepSizes(TypedDict):
    """What a LoRA step's memory follows from, besides its tokens.

    Attributes:
        parameters: of the frozen base.
        trainable: of the adapter; 16 bytes each with Adam (weight, gradient, two moments), and a copy in the base's
            format.
        dtype_bytes: of a number of the base (2 for bfloat16).
        gradient_checkpointing: keep only each layer's input, and recompute one layer at a time.
        keys: tokens of the longest row, where attention keeps its weights; 0 on a device where a fused kernel always
            runs; None or left out, the most for which they are kept.
        logit_chunk: bytes of one chunk of logits; LOGIT_CHUNK_BYTES if left out, larger on a GPU.
        base_bytes: of the frozen base, where that is not parameters times dtype_bytes (tunery.models.quantized).
        lean: which parts of the model keep less; all, if left out.
    """

    parameters: int
    trainable: int
    dtype_bytes: int
    gradient_checkpointing: bool
    keys: NotRequired[int | None]
    logit_chunk: NotRequired[int]
    base_bytes: NotRequired[int | None]
    lean: NotRequired[Lean]


def estimate(
    config: PreTrainedConfig, *, tokens_in_flight: int, trained_tokens: int, **sizes: Unpack[StepSizes]
) -> MemoryEstimate:
    """Peak memory of a LoRA step on one packed sequence.

    Args:
        config: of the model.
        tokens_in_flight: computed tokens of a micro-batch.
        trained_tokens: predicting positions of a micro-batch.
        sizes: see StepSizes.

    What is kept is held by tests to what autograd really saves; the whole, to measured peaks in docs/lab.md.
    """
    w, dtype_bytes, keys = _Widths.of(config), sizes["dtype_bytes"], sizes.get("keys")
    logit_chunk = sizes.get("logit_chunk", LOGIT_CHUNK_BYTES)
    keys = min(KEPT_KEYS, tokens_in_flight) if keys is None else keys if keys <= KEPT_KEYS else 0
    layer = tokens_in_flight * _layer_bytes(w, dtype_bytes, keys, sizes.get("lean", LEAN))
    kept = layer * w.layers
    if sizes["gradient_checkpointing"]:
        kept = min(kept, layer + tokens_in_flight * dtype_bytes * w.hidden * w.layers)
    copies = LOGIT_COPIES * max(4, dtype_bytes) / dtype_bytes / LOGIT_PARTS
    if logit_chunk > LOGIT_CHUNK_BYTES:
        copies = max(1.0, copies)
    chunk = min(dtype_bytes * trained_tokens * w.vocabulary, max(logit_chunk, dtype_bytes * w.vocabulary))
    base = sizes.get("base_bytes")
    return MemoryEstimate(
        base=sizes["parameters"] * dtype_bytes if base is None else base,
        adapter_and_optimizer=sizes["trainable"] * (16 + dtype_bytes),
        activations=int(kept + tokens_in_flight * _working_bytes(w, dtype_bytes)),
        logits=int(chunk * (1 + copies)),
    )


def tokens_that_fit(config: PreTrainedConfig, *, budget_bytes: int, **sizes: Unpack[StepSizes]) -> int:
    """The most tokens in flight, all of them predicting, whose estimate keeps to the budget; 0 if not one fits.

    Args:
        sizes: see StepSizes.
    """

    def total(tokens: int) -> int:
        return estimate(config, tokens_in_flight=tokens, trained_tokens=tokens, **sizes).total

    return max(0, bisect.bisect_right(range(MOST_TOKENS), budget_bytes, key=total) - 1)
