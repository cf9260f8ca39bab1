"""Reads folders with the transformers it is started with, and writes down what it found: run by the Python of another
environment (tests/export/test_transformers4.py), so nothing of tunery is imported.

    PYTHON read_in_transformers4.py JOBS.json FOUND.safetensors FOUND.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_model(job: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Facts and logits [tokens, vocabulary] of a model, with a PEFT adapter on it where the job names one."""
    folder = Path(job["model"])
    file = {"gguf_file": job["gguf_file"]} if "gguf_file" in job else {}
    # its usual attention leaves the soft cap of Gemma 2's scores out
    both: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True, **file
    )
    model, loaded = both
    lost = sorted(map(str, [*loaded["missing_keys"], *loaded["unexpected_keys"], *loaded["mismatched_keys"]]))
    facts = {"lost": lost, "ends": model.generation_config.eos_token_id, "dtype": str(model.dtype)}
    if "adapter" in job:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        logits = model.eval()(torch.tensor([job["ids"]])).logits[0].float()
    return facts, logits


def read_tokenizer(job: dict[str, Any]) -> dict[str, Any]:
    """What a tokenizer makes of texts and of a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    told = job.get("messages")
    return {
        "class": type(tokenizer).__name__,
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]],
        "whole": [tokenizer(text)["input_ids"] for text in job["texts"]],
        "back": [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in job["texts"]],
        "chat": tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True) if told else None,
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id],
        "without_special": tokenizer.decode(list(range(len(tokenizer))), skip_special_tokens=True),
        "padding_side": tokenizer.padding_side,
        "inputs": sorted(tokenizer(job["texts"][0])),
        "length": len(tokenizer),
    }


def main() -> None:
    """Do all jobs; one that fails says why and does not stop the others."""
    jobs, tensors, facts = sys.argv[1:]
    logits: dict[str, torch.Tensor] = {}
    found: dict[str, Any] = {"transformers": transformers.__version__}
    for name, job in json.loads(Path(jobs).read_text(encoding="utf-8")).items():
        try:
            if "model" in job:
                found[name], logits[name] = read_model(job)
            else:
                found[name] = read_tokenizer(job)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    save_file(logits, tensors)
    Path(facts).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
