"""Finished runs of tiny models to export, made in seconds: a real base folder, real data, a real receipt."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tunery
from tests.support.shapes import tiny_model
from tests.tiny import CHATML, CONTROL_TOKENS
from tunery.console import Console
from tunery.paths import file_sha256

QUIET = Console(quiet=True)

LINES = (
    "hello there, how are you today? I'm fine, you're fine, we'll see.",
    "the answer is good and the film is bad; the film is fine, the answer is 42",
    "a fine film, a dull film, the best of films: 1. one 2. two\n\n3. three",
    "system user assistant model: what is this? It's a film.\n\tdef film(x):\n    return x",
)

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def _cut(name: str) -> Any:
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    pattern = {"llama-bpe": LLAMA3, "qwen2": QWEN2}[name]
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@functools.cache
def _trained(cut: str) -> str:
    tokenizer = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer = _cut(cut)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    return tokenizer.to_str()


def byte_level(cut: str = "gpt-2", template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts text as the model of that name does; its eos token is <|im_end|>."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(cut)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer of Gemma's kind: BPE on text whose spaces are ▁, bytes for what it does not know."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(LINES * 4, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learnt = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in learnt)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece, _ in learnt
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    made.chat_template = GEMMA_TEMPLATE
    return made


CUTS = {"llama": "smollm", "mistral": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "gpt2": "gpt-2"}
"""Shape → how its tokenizer cuts text; Gemma's shapes get SentencePiece's."""


def save_base(
    folder: Path, shape: str, dtype: torch.dtype = torch.float32, tied: bool | None = None, **changes: Any
) -> Path:
    """Save a tiny random model with a tokenizer of its family; returns the folder."""
    if shape.startswith("gemma"):
        tokenizer = sentencepiece()
    else:  # GPT-2 brings no chat template
        tokenizer = byte_level(CUTS[shape], template=None if shape == "gpt2" else CHATML)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape == "mistral":  # llama.cpp computes no window, so it takes no longer rows than that
        changes = {"sliding_window": None, **changes}
    shards = changes.pop("max_shard_size", None)
    model = tiny_model(shape, dtype, tied, **{"vocab_size": len(tokenizer), **ids, **changes})
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(folder: Path, kind: str) -> None:
    """Thirty rows of a kind."""
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for i in range(30):
            word = "fine" if i % 2 else "dull"
            rows = {
                "classification": {"text": f"film {i} is {word}", "label": "good" if i % 2 else "bad"},
                "completion": {"prompt": f"film {i}", "completion": f" is {word}, it's {i}"},
                "chat": {
                    "messages": [
                        {"role": "user", "content": f"how is film {i}?"},
                        {"role": "assistant", "content": f"The film is {word}.\n\n{i} of 42"},
                    ]
                },
            }
            file.write(json.dumps(rows[kind]) + "\n")


def make_run(
    folder: Path, base: Path, kind: str = "chat", *settings: str, rows: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Train two steps, then give the adapter values large enough to matter; returns the run directory."""
    folder.mkdir(exist_ok=True)
    write_rows(folder, kind)
    if rows is not None:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        f"name: films\nmodel: {base}\noutput: {folder / 'runs'}\nseed: 1\n"
        f"data:\n  train: {folder / 'rows.jsonl'}\n  validation: 8\n"
        "lora:\n  rank: 4\ntrain:\n  max_steps: 2\n  batch_size: 4\n  precision: float32\n  eval_steps: null\n"
        "evaluate:\n  enabled: false\n"
    )
    run = tunery.train(folder / "task.yaml", list(settings), progress=QUIET).path
    shake(run)
    return run


def shake(run: Path, size: float = 0.1, seed: int = 3) -> None:
    """Random numbers into every B of the adapter, and its new hash into the receipt."""
    file, receipt = run / "adapter" / "adapter_model.safetensors", run / "receipt.json"
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name or "embedding_A" in name:
            tensors[name] = size * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    facts = json.loads(receipt.read_text())
    facts["adapter"]["sha256"] = file_sha256(file)
    receipt.write_text(json.dumps(facts))
