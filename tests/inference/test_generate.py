"""Answers by generation and labels by scoring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from tests.tiny import tiny_llama_config, tiny_tokenizer
from tunery.data.example import Example, Place
from tunery.data.render import Renderer
from tunery.evaluation.labels import label_rows, score_labels
from tunery.fast.adapters import apply_lora
from tunery.fast.packed_model import optimize_model
from tunery.inference.generate import Sampling, generate, stream
from tunery.lora.attach import disabled
from tunery.training.scoring import Scorer


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(len(tiny_tokenizer()))).eval()


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [20], [21, 22, 23, 24, 25], [3, 4] * 7]


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    sampling = Sampling(max_new_tokens=12)
    together = generate(model, tokenizer, PROMPTS, sampling, [2])
    alone = [generate(model, tokenizer, [prompt], sampling, [2])[0] for prompt in PROMPTS]
    assert together == alone
    assert ["".join(stream(model, tokenizer, prompt, sampling, [2])) for prompt in PROMPTS] == alone


def test_an_answer_ends_at_a_stop_token_which_is_not_part_of_it(model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    whole = generate(model, tokenizer, PROMPTS[:1], Sampling(max_new_tokens=12), [])[0]
    tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
    stop = tokens[4]
    cut = generate(model, tokenizer, PROMPTS[:1], Sampling(max_new_tokens=12), [stop])[0]
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_a_drawn_answer_is_repeated_by_its_seed(model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    drawn = [
        generate(model, tokenizer, PROMPTS[:1], Sampling(max_new_tokens=12, temperature=1.5, seed=seed), [2])[0]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_label_scores_are_the_log_probabilities_of_the_whole_answers(model: PreTrainedModel) -> None:
    renderer = Renderer(tiny_tokenizer(), labels=["good", "good film", "bad"], instruction="which?")
    examples = [Example("classification", Place("r", i), text=f"film {i}", label="bad") for i in range(3)]
    given = label_rows(renderer, examples, 200)
    scores = score_labels(Scorer(optimize_model(model)), given, 3)
    assert given.truth.tolist() == [2, 2, 2]
    for index, row in enumerate(given.rows):
        ids = torch.from_numpy(row.ids.astype(np.int64))
        with torch.no_grad():
            log = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        wanted = sum(float(log[t - 1, ids[t]]) for t in np.flatnonzero(row.weights))
        assert scores.log_probability[index // 3, index % 3] == pytest.approx(wanted, rel=1e-4)
    assert scores.probability.sum(axis=1) == pytest.approx([1, 1, 1])
    true = [scores.log_probability[i, 2] for i in range(3)]
    tokens = sum(given.rows[3 * i + 2].trained for i in range(3))
    assert scores.loss == pytest.approx(-sum(true) / tokens)


def test_the_base_side_of_a_comparison_is_the_base(model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    before = generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8), [2])
    apply_lora(model, rank=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned = generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8), [2])
    assert tuned != before
    with disabled(model):
        assert generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8), [2]) == before


def test_all_labels_of_a_long_text_are_scored_after_the_same_prompt() -> None:
    renderer = Renderer(tiny_tokenizer(), labels=["a", "bb bb bb bb bb bb"], instruction="which?")
    long, short = (Example("classification", Place("r", 1), text="film " * n, label="a") for n in (100, 2))
    given = label_rows(renderer, [long, short], 80)
    assert given.examples == [0, 1]
    prompts = [row.ids[: int(np.flatnonzero(row.weights)[0])].tolist() for row in given.rows]
    assert prompts[0] == prompts[1]
    assert max(len(row.ids) for row in given.rows) <= 80
    assert label_rows(renderer, [long, short], 80, "drop").examples == [1]
