"""Tiny random models of every architecture tunery is tested on: hidden size 32, two layers, 96 tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tunery.models.load import attention_settings

VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2}
_NO_SCALING = {"rope_type": "default", "rope_theta": 1e4}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {k: v for k, v in _COMMON.items() if k not in ("hidden_size", "intermediate_size")} | _GPT2),
    "llama": ("llama", _GROUPED),
    "qwen2": ("qwen2", _COMMON | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", _GROUPED),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 8}),
    "gemma": ("gemma", _GROUPED),
    "gemma2": ("gemma2", _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", _COMMON | {"num_key_value_heads": 2}),
    "opt": ("opt", _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "gpt_neox": ("gpt_neox", _COMMON),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}),
    "gpt_oss": ("gpt_oss", _EXPERTS | {"num_local_experts": 4, "rope_parameters": _NO_SCALING}),
}

EXPERT_SHAPES = ("qwen3_moe", "gpt_oss")
"""Mixtures of experts, whose expert weights are fused into single parameters."""

SHAPES = tuple(name for name in _CONFIGS if name not in EXPERT_SHAPES)


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, tied: bool | None = None, **changes: Any
) -> PreTrainedModel:
    """A random model in eval mode, the same at every call.

    Args:
        name: of SHAPES or EXPERT_SHAPES.
        tied: whether embedding and head share their weight; None is the architecture's usual way.
        changes: to the configuration.
    """
    model_type, settings = _CONFIGS[name]
    if tied is not None:
        settings = settings | {"tie_word_embeddings": tied}
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    # the grouped kernel for experts knows no float64
    implementation = {"experts_implementation": "eager"} if name in EXPERT_SHAPES else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, **implementation, **attention_settings(config))
    return model.to(dtype).eval()


def token_ids(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random tokens [rows, length], none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
