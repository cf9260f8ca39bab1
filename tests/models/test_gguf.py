"""A GGUF file becomes the same model as its dense original, once, and a damaged copy is made again."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny import CHATML, tiny_llama_config, tiny_tokenizer
from tunery.errors import ModelError
from tunery.models.gguf import bits_of, convert, few_bits
from tunery.models.load import load_base, load_tokenizer
from tunery.models.model_source import locate, shared_name
from tunery.paths import file_sha256

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """ "model.layers.0.mlp.up_proj.weight" → "blk.0.ffn_up.weight"."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    name = name.removesuffix(".weight")
    if name in outer:
        return f"{outer[name]}.weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order that GGUF's rotary embedding wants."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, cut: str = "default") -> LlamaForCausalLM:
    """Write a tiny Llama in float32 with its tokenizer and chat template as a GGUF file; returns the original."""
    tokenizer = tiny_tokenizer()
    config = tiny_llama_config(len(tokenizer))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    out = gguf.GGUFWriter(path, "llama")
    out.add_license("mit")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    assert config.num_key_value_heads is not None
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10_000.0)
    out.add_vocab_size(len(tokenizer))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(cut)
    out.add_token_list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    out.add_token_types([3] * 3 + [1] * (len(tokenizer) - 3))  # the first three are control tokens
    out.add_token_merges(
        [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    )
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(False)
    out.add_chat_template(CHATML)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        out.add_tensor(gguf_name(name), (interleaved(tensor, heads) if heads else tensor).numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_converted_model_gives_the_original_logits_and_tokens(
    original: tuple[Path, LlamaForCausalLM], own_cache: Path
) -> None:
    path, model = original
    base = load_base(str(path), precision="float32")
    text = "<|im_start|>user\nhello there, a fine film  é🙂<|im_end|>\n"
    ids = tiny_tokenizer()(text)["input_ids"]
    assert base.tokenizer(text)["input_ids"] == ids
    assert base.tokenizer.chat_template == CHATML
    assert base.tokenizer.eos_token == "<|im_end|>"
    assert torch.allclose(base.model(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits, atol=1e-5)
    assert base.info.sha256 == file_sha256(path)
    assert (base.info.source, base.info.license, base.info.template_source) == (str(path), "mit", "model")


def test_it_is_converted_once_and_says_so(
    original: tuple[Path, LlamaForCausalLM], own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = convert(original[0]).folder
    assert capfd.readouterr() == ("", "converting tiny.gguf once (about 20 s for 100 MB) …\n")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    moved = shutil.copy(original[0], own_cache / "other-name.gguf")
    assert convert(Path(moved)).folder == folder  # the content decides, not the name
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert capfd.readouterr() == ("", "")


def test_a_damaged_copy_is_made_again(
    original: tuple[Path, LlamaForCausalLM], own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = convert(original[0]).folder
    whole = (folder / "model.safetensors").read_bytes()
    leftover = folder.with_name(f".{folder.name}.tmp-1")
    for damage in (whole[:-50], whole[:-50] + b"x" * 50):
        (folder / "model.safetensors").write_bytes(damage)
        leftover.mkdir()
        convert(original[0])
        assert (folder / "model.safetensors").read_bytes() == whole
        assert not leftover.exists()
    (folder / "tokenizer.json").unlink()
    convert(original[0])
    assert (folder / "tokenizer.json").exists()
    assert capfd.readouterr().err.count("converting") == 4


def test_of_two_at_once_one_converts_and_the_other_waits(
    original: tuple[Path, LlamaForCausalLM], own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(convert(original[0]).folder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert capfd.readouterr().err.count("converting") == 1


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "broken.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be converted") as caught:
        convert(path)
    assert caught.value.__cause__ is not None
    assert [p.suffix for p in (own_cache / "gguf").iterdir()] == [".lock"]


def test_a_tokenizer_that_would_change_is_refused(
    original: tuple[Path, LlamaForCausalLM], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["before", "after"])
    monkeypatch.setattr("tunery.models.gguf._behaviour", lambda tokenizer: next(answers))
    with pytest.raises(ModelError, match="changed while it was converted"):
        convert(original[0])


@pytest.mark.parametrize(("cut", "digits"), [("smollm", ["1", "2", "3"]), ("gpt-2", ["123"])])
def test_digits_are_cut_off_where_the_file_says_so(
    cut: str, digits: list[str], tmp_path: Path, own_cache: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", cut)
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a:\n\n123 b")]
    breaks = ["ĊĊ"] if cut == "smollm" else ["Ċ", "Ċ"]
    assert pieces == ["a", ":", *breaks, *digits, "Ġb"]


def test_what_is_no_whole_gguf_file_is_refused_at_once(
    original: tuple[Path, LlamaForCausalLM], tmp_path: Path, own_cache: Path
) -> None:
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        convert(pointer)
    part = shutil.copy(original[0], tmp_path / "big-00002-of-00003.gguf")
    with pytest.raises(ModelError, match="one part of several") as caught:
        convert(Path(part))
    assert "llama-gguf-split" in str(caught.value.hint)


def test_a_cache_that_cannot_be_written_is_said(
    original: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be written") as caught:
        convert(original[0])
    assert "TUNERY_CACHE" in str(caught.value.hint)


def test_the_real_model_loads_answers_and_keeps_its_tokenizer(smollm2: str) -> None:
    base = load_base(smollm2, precision="float32", device="cpu")
    assert (base.info.architecture, base.info.parameters) == ("LlamaForCausalLM", 134_515_008)
    assert (base.info.license, base.info.template_source) == ("apache-2.0", "model")
    assert len(load_tokenizer(smollm2)) == 49_152
    assert base.tokenizer.convert_ids_to_tokens(base.tokenizer("a:\n\n12")["input_ids"]) == ["a", ":", "ĊĊ", "1", "2"]
    text = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    model: Any = base.model  # transformers' `generate` names a Protocol that none of its models satisfies
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in base.tokenizer.decode(answer)


def test_the_base_of_a_package_is_known_by_its_hub_id_and_its_bits(smollm2: str) -> None:
    source = locate(smollm2)
    for name in (smollm2, source.origin, str(source.folder)):
        assert shared_name(name) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (
        few_bits(smollm2, source.file_type)
        == f"the base {smollm2} is read from a file with about 4 bits a weight (Q4_1)"
    )


def test_a_file_of_ones_own_is_known_by_its_place(original: tuple[Path, LlamaForCausalLM]) -> None:
    file = original[0]
    source = locate(str(file))
    assert shared_name(str(source.folder)) == shared_name(str(file)) == str(file)
    assert source.file_type is None


@pytest.mark.parametrize(
    ("file_type", "bits"), [("Q4_K_M", 4), ("IQ2_XS", 2), ("Q8_0", 8), ("TQ1_0", 1), ("F16", None), (None, None)]
)
def test_bits_of_a_weight_as_the_files_type_says(file_type: str | None, bits: int | None) -> None:
    assert bits_of(file_type) == bits
