"""What is written in transformers' format has nothing of this machine, and what older versions need. That these really
read it is seen in tests/export/test_transformers4.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.support.shapes import SHAPES, tiny_model
from tests.tiny import tiny_tokenizer
from tunery.models.portable import ending_at, portable_config, save_tokenizer
from tunery.paths import read_json, write_json

TEXT = "a fine film<|tool|><|im_end|>"


def test_a_tokenizer_has_a_class_that_others_know_and_nothing_of_this_machine(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    write_json(file, {**read_json(file), "sp_dir": str(tmp_path), "merges_file": "/home/x/m", "padding_side": "left"})
    save_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "base", local_files_only=True), tmp_path / "ours")
    written = read_json(tmp_path / "ours" / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "name_or_path", "sp_dir", "merges_file"} & set(written)
    assert str(tmp_path) not in (tmp_path / "ours" / "tokenizer_config.json").read_text()
    assert written["additional_special_tokens"] == ["<|tool|>"]
    assert written["padding_side"] == "left"
    again = AutoTokenizer.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.chat_template == tokenizer.chat_template


FAR = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("stored", "older"),
    [
        ({"rope_parameters": FAR}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_parameters": YARN},
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
        ),
        (
            {"rope_parameters": {**FAR, "partial_rotary_factor": 0.5}},
            {"rope_theta": 5e5, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {**FAR, "partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 5e5, "rope_scaling": None, "rotary_pct": 0.5},
        ),
        (
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {**FAR, "rope_theta": 1e4}}},
            {
                "rope_theta": 5e5,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"},
            },
        ),
        (
            {"rope_parameters": {"sliding_attention": FAR}},
            {"rope_theta": 5e5, "rope_local_base_freq": 5e5, "rope_scaling": None},
        ),
        ({"rope_theta": 1e6, "rope_parameters": {**FAR, "rope_theta": 1e6}}, {"rope_scaling": None}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {}),
        ({"num_local_experts": 4}, {"num_experts": 4}),
    ],
)
def test_a_configuration_has_the_older_names_beside_the_newer(stored: dict[str, Any], older: dict[str, Any]) -> None:
    assert portable_config(stored) == {**stored, **older}
    inside = portable_config({"text_config": stored})["text_config"]
    assert inside == {**stored, **older}


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_5_reads_the_same_configuration_as_before(shape: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_parameters": YARN} if shape in ("llama", "qwen3", "mistral") else {}
    tiny_model(shape, **rope).config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    write_json(tmp_path / "config.json", portable_config(read_json(tmp_path / "config.json")))
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize(
    ("known", "stops", "ends"),
    [(None, [2], 2), (2, [2], 2), (2, [0, 2], [2, 0]), ([5, 2], [2], [5, 2]), (None, [], None), (7, [], 7)],
)
def test_generation_ends_at_the_bases_tokens_and_at_the_trained_one(known: Any, stops: list[int], ends: Any) -> None:
    stored = {"temperature": 0.6} if known is None else {"temperature": 0.6, "eos_token_id": known}
    written = ending_at(stored, stops)
    assert written.get("eos_token_id") == ends
    assert written["temperature"] == 0.6
