"""How far each layer's attention sees, from a model's configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunery.data.batching import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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


def attention_width(config: PreTrainedConfig) -> int:
    """Numbers in a token's queries, all heads together; 0 for a model without attention."""
    config = config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0


def visible_pairs(windows: Counter[int | None], batch: PackedBatch) -> int:
    """Queries and keys that see each other, summed over layers with these windows (`layer_windows`)."""
    return sum(layers * batch.visible_pairs(window) for window, layers in windows.items())
