"""Small stand-ins for tests: a byte-level tokenizer with ChatML control tokens, and a random Llama that fits it."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LINES = (
    "hello there, how are you today?",
    "the answer is good and the film is bad",
    "a fine film, a dull film, the best of films",
    "system user assistant: what is this?",
)


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens; every text survives a round trip. Its eos token is <|im_end|>."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama_config(vocabulary: int, width: int = 32) -> LlamaConfig:
    """Two layers, four query heads over two key-value heads."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # so that logits differ and a few steps teach something
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def save_tiny_llama(
    folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, *, seed: int = 0, width: int = 32
) -> Path:
    """Save a random Llama in float32 and its tokenizer, as a model folder; returns the folder."""
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_llama_config(len(tokenizer), width)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
