"""How far each layer's attention sees and how wide it is, from a model's configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunery.data.batching import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def context_length(config: PreTrainedConfig) -> int:
    """The most tokens, prompt and answer together, that a model takes."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """Sliding window of each layer's attention, None for the whole row, from a model's configuration."""
    config = config.get_text_config()
    layers = int(getattr(config, "num_hidden_layers", 0))
    window = getattr(config, "sliding_window", None)
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return [None] * layers
    if kinds is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


@dataclass(frozen=True)
class AttentionHeads:
    """The heads of a model's attention.

    Attributes:
        queries, keys: how many there are of each; 0 for a model without attention.
        width: numbers in a query and a key.
    """

    queries: int
    keys: int
    width: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> AttentionHeads:
        """From a model's configuration."""
        config = config.get_text_config()
        queries = int(getattr(config, "num_attention_heads", None) or getattr(config, "n_heads", None) or 0)
        if not queries:
            return cls(0, 0, 0)
        keys = int(getattr(config, "num_key_value_heads", None) or queries)
        width = getattr(config, "head_dim", None)
        return cls(queries, keys, int(width or (getattr(config, "hidden_size", None) or config.d_model) // queries))


def attention_width(config: PreTrainedConfig) -> int:
    """Numbers in a token's queries, all heads together; 0 for a model without attention."""
    heads = AttentionHeads.of(config)
    return heads.queries * heads.width


def visible_pairs(windows: Counter[int | None], batch: PackedBatch) -> int:
    """Queries and keys that see each other, summed over layers with these windows (`layer_windows`)."""
    return sum(layers * batch.visible_pairs(window) for window, layers in windows.items())
