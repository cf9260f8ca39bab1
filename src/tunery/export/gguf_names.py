"""Where a model's tensors and settings go in a GGUF file, for the architectures that are exported.

Names of tensors are those of the `gguf` library's table. What llama.cpp computes differently from transformers, and how
the stored numbers make up for it:

- Llama and Mistral: rotary embedding turns neighbouring numbers of a head instead of those half a head apart, so the
  rows of query and key projections change their order.
- Gemma: a norm multiplies by its weight instead of by 1 + weight, so 1 is added.
- GPT-2: linear layers are stored as [in, out] in transformers, as [out, in] here.
- Llama 3: the rotary frequencies that its scaling changes are given as a tensor of divisors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf
import numpy as np

from tunery.errors import ConfigError
from tunery.jsonl import JsonMapping, JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor goes, and how it is stored there.

    Attributes:
        name: in the GGUF file.
        order: row i there is row order[i] of the model's tensor; None: the same order.
        flipped: [in, out] there is [out, in].
        plus_one: 1 is added.
    """

    name: str
    order: np.ndarray | None = None
    flipped: bool = False
    plus_one: bool = False

    @property
    def plain(self) -> bool:
        """Whether rows are stored as they are."""
        return self.order is None and not self.flipped


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        arch: in the `gguf` library.
        settings: writes the model's settings.
        refusal: says what llama.cpp cannot compute as this model's configuration asks; None if it can.
        rotated: projections whose rows change their order, each with the setting that holds its number of heads.
        norms_plus_one: Gemma's norms.
        head: a head that is not tied to the embedding has a place.
    """

    arch: gguf.MODEL_ARCH
    settings: Callable[[gguf.GGUFWriter, PreTrainedConfig], None]
    refusal: Callable[[PreTrainedConfig], str | None]
    rotated: tuple[tuple[str, str], ...] = ()
    norms_plus_one: bool = False
    head: bool = True

    @property
    def name(self) -> str:
        """As it stands in the file."""
        return gguf.MODEL_ARCH_NAMES[self.arch]


_NOT_WEIGHTS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
"""Buffers that some releases store: causal masks, rotary frequencies."""


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """llama.cpp's architecture for a model.

    Raises:
        ConfigError: the model is of a kind that is not exported, or its settings are beyond llama.cpp.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ConfigError(
            f"models of type {config.model_type} cannot be written as GGUF here",
            f"types that can: {', '.join(ARCHITECTURES)}; for others use --to merged and llama.cpp's own "
            "convert_hf_to_gguf.py",
        )
    if reason := found.refusal(config):
        raise ConfigError(f"llama.cpp computes this model differently: {reason}", "use --to merged")
    return found


def place_tensors(architecture: Architecture, config: PreTrainedConfig, names: Sequence[str]) -> dict[str, TensorPlace]:
    """Where each tensor goes, in the order given; buffers that hold no weights are left out.

    Raises:
        ConfigError: a tensor has no place in that architecture.
    """
    table = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    places = {}
    for name in names:
        if _NOT_WEIGHTS.search(name):
            continue
        there = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise ConfigError(
                f"{name} has no place in a GGUF file of a {architecture.name} model", "use --to merged instead"
            )
        places[name] = _place(architecture, config, name, there)
    return places


def _place(architecture: Architecture, config: PreTrainedConfig, name: str, there: str) -> TensorPlace:
    heads = next((setting for layer, setting in architecture.rotated if f".{layer}." in name), None)
    if heads is not None:
        return TensorPlace(there, order=_interleaved(getattr(config, heads), _head_size(config)))
    if architecture.norms_plus_one and name.endswith("norm.weight"):
        return TensorPlace(there, plus_one=True)
    flipped = config.model_type == "gpt2" and name.endswith(_CONV1D)
    return TensorPlace(there, flipped=flipped)


_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def _interleaved(heads: int, size: int) -> np.ndarray:
    """Rows of a projection, both halves of each head in turn: 0, size/2, 1, size/2 + 1, …"""
    return np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# --------------------------------------------------------------------------- settings


def _common(out: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    out.add_context_length(_context(config))
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_head_count(config.num_attention_heads)


def _context(config: PreTrainedConfig) -> int:
    """The longest context. llama.cpp knows no window in Mistral's architecture; up to its length there is no
    difference."""
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return min(window or config.max_position_embeddings, config.max_position_embeddings)


def _modern(out: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """Llama and what came after it: RMS norms, grouped heads, rotary positions."""
    _common(out, config)
    size = _head_size(config)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_key_length(size)
    out.add_value_length(size)
    out.add_rope_dimension_count(size)
    _rope(out, rope_of(config))


def _rope(out: gguf.GGUFWriter, rope: JsonMapping) -> None:
    out.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(float(rope["factor"]))
        out.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        if rope.get("beta_fast"):
            out.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
        if rope.get("beta_slow"):
            out.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))


def rope_of(config: PreTrainedConfig, layers: str = "full_attention") -> JsonObject:
    """The rotary settings; of a model with two kinds of layers (Gemma 3), those of one kind."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope[layers]) if isinstance(rope.get(layers), dict) else rope


def rope_divisors(config: PreTrainedConfig) -> np.ndarray | None:
    """Llama 3's scaling as a divisor for each rotary frequency [head size / 2]; None for other models."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size = _head_size(config)
    plain = float(rope["rope_theta"]) ** -(np.arange(0, size, 2) / size)
    return (plain / scaled.double().numpy()).astype(np.float32)


def _llama(out: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    _modern(out, config)
    out.add_vocab_size(config.vocab_size)


def _gemma2(out: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    _modern(out, config)
    if config.attn_logit_softcapping:
        out.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        out.add_final_logit_softcapping(config.final_logit_softcapping)
    out.add_sliding_window(config.sliding_window)


def _gemma3(out: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    _modern(out, config)
    out.add_sliding_window(config.sliding_window)
    out.add_rope_freq_base_swa(float(rope_of(config, "sliding_attention").get("rope_theta", 10_000.0)))
    if config.final_logit_softcapping:
        out.add_final_logit_softcapping(config.final_logit_softcapping)


def _gpt2(out: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    _common(out, config)
    out.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    out.add_layer_norm_eps(config.layer_norm_epsilon)


# --------------------------------------------------------------------------- what cannot be computed


def _rope_refusal(config: PreTrainedConfig) -> str | None:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        return f"rotary scaling of type {kind}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "rotary positions on a part of each head"
    return None


def _plain_llama_refusal(config: PreTrainedConfig) -> str | None:
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    if _head_size(config) % 2:
        return "heads of an odd size"
    return _rope_refusal(config)


def _qwen_refusal(config: PreTrainedConfig) -> str | None:
    if getattr(config, "attention_bias", False) and config.model_type == "qwen3":
        return "attention_bias"
    if getattr(config, "sliding_window", None) is not None:
        return "a sliding window"
    return _plain_llama_refusal(config)


def _gemma_refusal(config: PreTrainedConfig) -> str | None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != "gelu_pytorch_tanh":
        return f"activation {activation}"
    if getattr(config, "use_bidirectional_attention", False):
        return "bidirectional attention"
    if getattr(config, "attention_bias", False):
        return "attention_bias"
    return _rope_refusal(config)


def _alternating(period: int, largest: int) -> Callable[[PreTrainedConfig], str | None]:
    """Refusals of Gemma 2 and 3: every `period`-th layer sees everything; the model of `largest` layers scales queries
    by the width of a head's share instead of its size."""

    def refusal(config: PreTrainedConfig) -> str | None:
        layers = range(config.num_hidden_layers)
        kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in layers]
        if list(config.layer_types) != kinds:
            return "another order of sliding and full attention"
        large = config.num_hidden_layers == largest
        expected = config.hidden_size // config.num_attention_heads if large else _head_size(config)
        if config.query_pre_attn_scalar != expected:
            return f"query_pre_attn_scalar {config.query_pre_attn_scalar} (it takes {expected})"
        if period == 6 and config.attn_logit_softcapping:
            return "attn_logit_softcapping"
        return _gemma_refusal(config)

    return refusal


def _gpt2_refusal(config: PreTrainedConfig) -> str | None:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        return f"activation {config.activation_function}"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "another scaling of attention"
    return None


_ROTATED = (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"))

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, _llama, _plain_llama_refusal, _ROTATED),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, _llama, _plain_llama_refusal, _ROTATED),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, _modern, _qwen_refusal),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, _modern, _qwen_refusal),
    "gemma": Architecture(gguf.MODEL_ARCH.GEMMA, _modern, _gemma_refusal, norms_plus_one=True, head=False),
    "gemma2": Architecture(gguf.MODEL_ARCH.GEMMA2, _gemma2, _alternating(2, 46), norms_plus_one=True, head=False),
    "gemma3_text": Architecture(gguf.MODEL_ARCH.GEMMA3, _gemma3, _alternating(6, 62), norms_plus_one=True),
    "gpt2": Architecture(gguf.MODEL_ARCH.GPT2, _gpt2, _gpt2_refusal),
}
"""By transformers' model type."""
