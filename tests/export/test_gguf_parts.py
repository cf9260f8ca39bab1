"""Numbers, names and tokenizers of GGUF files, each by itself."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoConfig

from tests.export.runs import byte_level, sentencepiece
from tests.support.shapes import tiny_model
from tunery.data.render import Renderer
from tunery.errors import ConfigError
from tunery.export import gguf_types
from tunery.export.gguf_names import ARCHITECTURES, architecture_of, place_tensors, rope_divisors
from tunery.export.gguf_tokenizer import begins_with_bos, read_vocabulary
from tunery.export.gguf_types import NUMBERS, bytes_of, encode, numbers_of

# --------------------------------------------------------------------------- dtypes

ERRORS = {
    Type.F32: 0.0,
    Type.F16: 1e-3,
    Type.BF16: 5e-3,
    Type.Q8_0: 0.01,
    Type.Q6_K: 0.03,
    Type.Q5_1: 0.06,
    Type.Q5_0: 0.07,
    Type.Q5_K: 0.06,
    Type.Q4_1: 0.11,
    Type.Q4_0: 0.13,
    Type.Q4_K: 0.11,
    Type.Q3_K: 0.22,
}
"""Relative error of normal numbers, root mean square."""


@pytest.mark.parametrize("kind", list(ERRORS))
def test_what_is_encoded_comes_back(kind: Type) -> None:
    numbers = np.random.default_rng(0).normal(size=(37, 512)).astype(np.float32)
    data = encode(numbers, kind)
    assert data.nbytes == bytes_of(numbers.shape, kind)
    back = gguf.quants.dequantize(data, kind).reshape(numbers.shape)
    error = float(np.sqrt(((back - numbers) ** 2).mean() / (numbers**2).mean()))
    assert error <= ERRORS[kind]
    assert np.array_equal(encode(numbers[5:9], kind), data[5:9])  # row by row gives the same


def test_which_tensor_gets_which_type() -> None:
    medium = NUMBERS["q4_k_m"]

    def kind(name: str, shape: tuple[int, ...], output: str = "token_embd.weight") -> Type:
        return medium.type_of(name, shape, 32, output)

    assert kind("blk.0.attn_norm.weight", (512,)) == Type.F32
    assert kind("position_embd.weight", (64, 512)) == Type.F32
    assert kind("blk.5.attn_q.weight", (512, 512)) == Type.Q4_K
    assert kind("blk.0.ffn_down.weight", (512, 1024)) == Type.Q6_K
    assert kind("blk.4.ffn_down.weight", (512, 1024)) == Type.Q4_K
    assert kind("blk.6.attn_v.weight", (512, 512)) == Type.Q6_K
    assert kind("token_embd.weight", (999, 512)) == Type.Q6_K
    assert kind("token_embd.weight", (999, 512), "output.weight") == Type.Q4_K
    assert kind("output.weight", (999, 512), "output.weight") == Type.Q6_K
    assert kind("blk.5.attn_q.weight", (576, 576)) == Type.Q5_0  # 576 is no multiple of 256
    assert kind("token_embd.weight", (999, 576)) == Type.Q8_0
    assert kind("blk.5.attn_q.weight", (40, 40)) == Type.F16
    assert NUMBERS["q4_0"].type_of("token_embd.weight", (99, 64), 2, "token_embd.weight") == Type.Q8_0


def test_a_type_that_nobody_makes_is_refused_with_those_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers_of("Q8_0") is NUMBERS["q8_0"]
    with pytest.raises(ConfigError, match="'iq2_xxs'") as caught:
        numbers_of("iq2_xxs")
    assert "by the gguf library: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0" in str(caught.value.hint)
    assert "by llama.cpp itself: q6_k, q5_k_m, q4_k_m, q3_k_m" in str(caught.value.hint)
    monkeypatch.setattr(gguf_types, "_ggml_quantize", lambda: None)
    with pytest.raises(ConfigError, match="q4_k_m is made by llama"):
        numbers_of("q4_k_m")
    assert numbers_of("q4_0").name == "q4_0"


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2"])
def test_every_tensor_has_a_place_of_its_own(shape: str) -> None:
    model = tiny_model(shape)
    architecture = architecture_of(model.config)
    names = [name for name, _ in model.named_parameters()]
    places = place_tensors(architecture, model.config, names)
    assert set(places) == set(names)
    assert len({place.name for place in places.values()}) == len(names)


def test_rotary_rows_are_interleaved_within_each_head() -> None:
    config = tiny_model("llama").config  # four heads of eight, two of them for keys
    places = place_tensors(
        ARCHITECTURES["llama"],
        config,
        [
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.1.self_attn.k_proj.weight",
            "model.layers.1.self_attn.v_proj.weight",
        ],
    )
    q, k, v = places.values()
    assert q.order is not None
    assert k.order is not None
    assert v.order is None
    assert q.order[:9].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8]
    assert sorted(q.order.tolist()) == list(range(32))
    assert len(k.order) == 16


def test_llama_3s_divisors_slow_the_slow_frequencies_only() -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model("llama", hidden_size=4096, num_attention_heads=32, rope_parameters=scaling)
    divisors = rope_divisors(config)
    assert divisors is not None
    assert divisors.shape == (64,)
    assert divisors[0] == pytest.approx(1.0)
    assert divisors[-1] == pytest.approx(8.0)
    assert np.all(np.diff(divisors) >= -1e-5)
    assert rope_divisors(AutoConfig.for_model("llama")) is None


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("phi3", {}, "models of type phi3"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rotary scaling of type dynamic",
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "a sliding window"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 26}, "another order of sliding and full attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "another scaling of attention"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(kind: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        architecture_of(AutoConfig.for_model(kind, **changes))


# --------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_way_to_cut_text_is_recognised(cut: str) -> None:
    tokenizer = byte_level(cut)
    found = read_vocabulary(tokenizer, len(tokenizer) + 3)
    assert (found.model, found.cut) == ("gpt2", cut)
    assert found.tokens[-3:] == [f"[PAD{len(tokenizer) + i}]" for i in range(3)]
    assert found.kinds[:3] == [TokenType.CONTROL] * 3
    assert set(found.kinds[3:-3]) == {TokenType.NORMAL}
    assert found.merges[0].count(" ") == 1
    assert not found.scores


def test_added_words_and_tokens_beyond_the_embedding() -> None:
    tokenizer = byte_level()
    size = len(tokenizer)
    tokenizer.add_tokens(["<think>", "<beyond>"])
    found = read_vocabulary(tokenizer, size + 1)
    assert found.tokens[-1] == "<think>"
    assert found.kinds[-1] == TokenType.USER_DEFINED
    assert len(found.tokens) == size + 1


def test_sentencepiece_has_scores_bytes_and_no_merges() -> None:
    tokenizer = sentencepiece()
    found = read_vocabulary(tokenizer, len(tokenizer))
    assert (found.model, found.cut, found.merges, found.space_first) == ("llama", "default", [], False)
    assert found.kinds[3] == TokenType.UNKNOWN
    assert found.kinds[6] == TokenType.BYTE
    scores = dict(zip(found.tokens, found.scores, strict=True))
    learnt = [score for score in found.scores if score > -1e6]
    assert learnt == sorted(learnt, reverse=True)  # pieces follow one another as they were learnt
    assert scores["▁film"] > scores["<pad>"] == -1e6
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    assert read_vocabulary(tokenizer, len(tokenizer)).space_first


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ConfigError, match="Punctuation"):
        read_vocabulary(tokenizer, 400)
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    with pytest.raises(ConfigError, match="it cuts text by"):
        read_vocabulary(tokenizer, 400)
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="rewrites text first"):
        read_vocabulary(tokenizer, 400)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert read_vocabulary(tokenizer, 400).cut == "gpt-2"


def test_the_first_token_is_llama_cpps_to_put_only_where_the_training_had_one_there() -> None:
    assert not begins_with_bos(Renderer(byte_level()), templated=True)  # ChatML opens every turn with it
    assert begins_with_bos(Renderer(sentencepiece()), templated=True)
    assert not begins_with_bos(Renderer(byte_level()), templated=False)


def test_a_vocabulary_is_complete_json() -> None:
    """Tokens with every sign survive the way through the library."""
    tokenizer = byte_level("qwen2")
    found = read_vocabulary(tokenizer, len(tokenizer))
    assert json.loads(json.dumps(found.tokens)) == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert torch.tensor([int(kind) for kind in found.kinds]).max() == 3
