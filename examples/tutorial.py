"""The eight steps of a LoRA tutorial, working: a GPT-2-shaped model, tunery's LoRA layer, Hugging Face's own Trainer.

    python examples/tutorial.py                  a small model with random weights, made here; no download
    python examples/tutorial.py --model gpt2     the real GPT-2 from the hub

A LoRA layer written by hand, as tutorials show it, goes wrong in these ways; the comments say where each is avoided.

[1] `rank` is used but never defined.
[2] The base is not frozen, so everything is trained.
[3] B is not zero, so training starts from a damaged model.
[4] There is no scaling by alpha / rank.
[5] `setattr` gets a dotted name, which replaces no module.
[6] `nn.Linear` is looked for, while GPT-2 has `Conv1D`: nothing matches, silently.
[7] The rows are never tokenised, or the end token is masked together with the padding.
[8] The whole model is saved instead of the adapter.
[9] Nothing is held out, so nobody sees it learn by heart.
"""

from __future__ import annotations

import argparse
import itertools
import random

# ---- Step 1: install -----------------------------------------------------------------------------------------------
#
#     pip install .        (from a clone of the repository; it brings torch and transformers)
#
# ---- Step 2: import ------------------------------------------------------------------------------------------------
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import tunery

parser = argparse.ArgumentParser(description="LoRA on a GPT-2-shaped model under Hugging Face's Trainer.")
parser.add_argument(
    "--model", help="a GPT-2-shaped model of the hub, or a folder; left out, a small one with random weights"
)
parser.add_argument("--out", default="runs/tutorial", help="folder for checkpoints and the adapter")
parser.add_argument("--epochs", type=float, default=6)
parser.add_argument("--rows", type=int, default=400, help="use only this many rows")
options = parser.parse_args()
set_seed(0)


# ---- Step 3: load the model ----------------------------------------------------------------------------------------
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without training: one token a byte, as at the bottom of GPT-2's own, and an end token."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


if options.model:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
else:
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    shape = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=128,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,  # large enough that a frozen head with random weights can be sure of a word
        bos_token_id=end,  # type: ignore[arg-type]
        eos_token_id=end,  # type: ignore[arg-type]
    )
    model = GPT2LMHeadModel(shape)


# ---- Step 4: prepare the data set ----------------------------------------------------------------------------------
# [7] A row must reach the model as token ids. Only the answer is trained, and the end token with it, so that the model
# learns to stop. Labels of -100 are not trained: the prompt, and the padding that `collate` adds. The padding is told
# by its place, not by its id: GPT-2 has no pad token, and masking every end token would mask the one to be learnt.
def tokenize(prompt: str, answer: str) -> dict[str, list[int]]:
    """One row: prompt, answer, end token."""
    before, after = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": [*before, *after], "labels": [-100] * len(before) + after}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of different lengths as tensors [rows, longest], padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    empty = {"input_ids": tokenizer.eos_token_id, "labels": -100}
    padded = {key: [row[key] + [fill] * (longest - len(row[key])) for row in rows] for key, fill in empty.items()}
    padded["attention_mask"] = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {key: torch.tensor(value) for key, value in padded.items()}


opinions = {
    "good": ("wonderful", "delightful", "superb", "charming", "splendid", "moving"),
    "bad": ("dreadful", "boring", "awful", "clumsy", "tedious", "dull"),
}
things = ("film", "book", "concert", "play", "meal", "trip", "lecture", "game", "museum", "hotel", "song", "party")
degrees = ("really", "rather", "simply")
rows = [
    (f"Review: The {thing} was {degree} {word}.\nOpinion:", f" {opinion}")
    for opinion, words in opinions.items()
    for word, thing, degree in itertools.product(words, things, degrees)
]
random.Random(0).shuffle(rows)
rows = [tokenize(prompt, answer) for prompt, answer in rows[: options.rows]]
held_out, rows = rows[: len(rows) // 10], rows[len(rows) // 10 :]


# ---- Step 5: the LoRA layer ----------------------------------------------------------------------------------------
# With a frozen weight W, the layer computes y = x Wᵀ + (alpha / rank) · x Aᵀ Bᵀ, A of [rank, in] and B of [out, rank].
# [1] The rank is an argument. [2] Everything but A and B is frozen. [3] B starts at zero, so training starts from the
# base itself. [4] The scaling keeps a learning rate useful when the rank changes. [5] Each module is replaced on its
# parent. [6] Conv1D is adapted as Linear is, and a target that matches nothing is an error.
probe = collate(held_out[:2])
with torch.no_grad():
    base_logits = model.eval()(**probe).logits

model = tunery.apply_lora(model, rank=8, alpha=16)

trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
everything = sum(parameter.numel() for parameter in model.parameters())
print(f"trainable parameters: {trainable:,} of {everything:,} ({trainable / everything:.1%})")

# ---- Step 6: the training arguments --------------------------------------------------------------------------------
# Memory is short? Halve the batch size and double the accumulation: the update stays the same.
# The loss does not fall? Try a rate two or three times higher or lower, with warm-up, and another scheduler. LoRA wants
# about ten times the rate of full fine-tuning.
arguments = TrainingArguments(
    output_dir=options.out,
    num_train_epochs=options.epochs,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=2e-3 if options.model is None else 5e-4,
    lr_scheduler_type="cosine",
    warmup_steps=5,
    logging_steps=5,
    logging_first_step=True,
    logging_nan_inf_filter=False,  # a loss that is not a number must be seen
    eval_strategy="steps",
    eval_steps=20,
    save_steps=20,
    save_total_limit=1,
    load_best_model_at_end=True,
    metric_for_best_model="eval_loss",
    report_to="none",
    dataloader_pin_memory=torch.cuda.is_available(),
)

# ---- Step 7: the Trainer -------------------------------------------------------------------------------------------
# [9] The held-out rows show overfitting: their loss rises while the training loss falls. Three validations without a
# better loss end the run, and the best weights are taken back.
trainer = Trainer(
    model=model,
    args=arguments,
    data_collator=collate,
    train_dataset=rows,  # type: ignore[arg-type]  (any list of rows will do)
    eval_dataset=held_out,  # type: ignore[arg-type]
    callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
)

# ---- Step 8: train -------------------------------------------------------------------------------------------------
trainer.train()

# [8] The adapter alone is saved, in PEFT's format: a few hundred kilobytes instead of the whole model.
tunery.save_adapter(model, f"{options.out}/adapter", base_model=options.model)

losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print(f"loss: {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
with torch.no_grad(), tunery.disabled(model):
    same = torch.equal(model.cpu().eval()(**probe).logits, base_logits)
print(f"the base is {'unchanged, bit for bit' if same else 'CHANGED'}")
print(f"adapter: {options.out}/adapter")
