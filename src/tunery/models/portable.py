"""What is written in transformers' format, so that others read it: transformers 4.57 as well as 5, on any machine.

transformers 5 names things in its own way, and 4.57 either refuses them (the class of a tokenizer) or overlooks them
and computes something else (the base of the rotary embedding, which it then takes from the class). Each is written
under both names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.jsonl import JsonObject, is_object
from tunery.paths import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The class that does what tokenizer.json says and no more, known to transformers 4.57 and 5. The classes of single
models put a beginning token of their own before a text in 4.57 (LlamaTokenizerFast), or are not known there at all."""

_STATE = {
    "is_local",
    "local_files_only",
    "name_or_path",
    "cache_dir",
    "force_download",
    "gguf_file",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_auth_token",
    "use_fast",
    "auto_map",  # names code of the base's repository, which is not in the folder
    "_commit_hash",
    "_from_auto",
}
"""Keys that say how a tokenizer was loaded, and where, not what it is."""


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files into a folder."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    # what the class of the model would decide where a general one reads the folder
    decided = {
        "tokenizer_class": TOKENIZER_CLASS,
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
    }
    write_json(file, _tokenizer_settings(read_json(file)) | decided)


def _tokenizer_settings(stored: JsonObject) -> JsonObject:
    """What transformers 5 writes, without the state of this machine; extra tokens by the name that both read."""
    settings = {
        key: value
        for key, value in stored.items()
        if key not in _STATE and not key.endswith("_file") and not _is_place(value)
    }
    if isinstance(settings.get("extra_special_tokens"), list):  # 4.57 expects names and their tokens there
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def _is_place(value: object) -> bool:
    return isinstance(value, str) and len(value) > 1 and Path(value).is_absolute() and Path(value).exists()


def portable_config(stored: JsonObject) -> JsonObject:
    """A model's configuration, as config.json holds it, with what transformers 4.57 reads beside what 5 reads."""
    config = with_older_names(stored)
    if is_object(text := config.get("text_config")):
        config["text_config"] = with_older_names(text)
    return config


_OLDER_ROPE: Mapping[str, Mapping[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "local": "local_rope_theta"},
}
"""model_type → settings that transformers 4.57 calls otherwise than in other models."""


def with_older_names(stored: JsonObject) -> JsonObject:
    """The part of a configuration that is about text, with the names of transformers 4.57 beside those of 5.

    What stands there under the older name already is left as it is.
    """
    config = dict(stored)
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    rope = config.get("rope_parameters")
    if not is_object(rope):
        return config
    names = _OLDER_ROPE.get(str(config.get("model_type")), {})
    # by kind of layer where these differ: what older versions call the model's own is that of full attention
    kinds = [value for value in rope.values() if is_object(value)]
    whole, local = rope.get("full_attention", kinds[0] if kinds else rope), rope.get("sliding_attention")
    if is_object(whole):
        for key in ("rope_theta", "partial_rotary_factor"):
            if whole.get(key) is not None:
                config.setdefault(names.get(key, key), whole[key])
        scaling = {key: value for key, value in whole.items() if key not in ("rope_theta", "partial_rotary_factor")}
        plain = scaling in ({}, {"rope_type": "default"})
        config.setdefault("rope_scaling", None if plain else scaling)  # absent, some classes put a scaling of their own
    if is_object(local) and local.get("rope_theta") is not None:
        config.setdefault(names.get("local", "rope_local_base_freq"), local["rope_theta"])
    return config


def ending_at(stored: JsonObject, stops: Sequence[int]) -> JsonObject:
    """A generation_config.json that ends at `stops` too.

    Args:
        stored: as the model's release has it; other keys stay, but for the one that would have transformers make the
            whole of it anew from config.json.
    """
    stored = {key: value for key, value in stored.items() if key != "_from_model_config"}
    known = stored.get("eos_token_id")
    before = known if isinstance(known, list) else [] if known is None else [known]
    ends = list(dict.fromkeys([*before, *stops]))
    return {**stored, "eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else stored
