"""A run's model answers the questions that were put to another one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunery.errors import DataError
from tunery.evaluation.generate import Sampling, context_length, generate
from tunery.evaluation.tuned import TunedModel
from tunery.hosted.ask import Answer
from tunery.hosted.questions import Question

CHUNK = 32
"""Questions answered between two remarks on how far it is."""


@dataclass(frozen=True)
class HereAnswers:
    """Answers in the order of the questions.

    Attributes:
        seconds: of answering them all, without loading.
        tokens: written.
    """

    answers: list[Answer]
    seconds: float
    tokens: int


def answer_here(
    tuned: TunedModel, questions: Sequence[Question], longest: int, note: Callable[[str], None]
) -> HereAnswers:
    """Let the tuned model answer, the likeliest token each time.

    Args:
        longest: an answer is cut after so many tokens.
    """
    room = context_length(tuned.model) - longest
    prompts = [_prompt(tuned, question) for question in questions]
    fitting = [i for i, prompt in enumerate(prompts) if isinstance(prompt, list) and len(prompt) <= room]
    answers = [Answer("", refused=prompt if isinstance(prompt, str) else "too long") for prompt in prompts]
    sampling, tokenizer = Sampling(max_new_tokens=longest), tuned.base.tokenizer
    started, tokens = time.perf_counter(), 0
    order = sorted(fitting, key=lambda i: len(prompts[i]))
    for at in range(0, len(order), CHUNK):
        part = order[at : at + CHUNK]
        ids = [list(prompts[i]) for i in part]
        for i, text in zip(part, generate(tuned.model, tokenizer, ids, sampling, tuned.renderer.stop_ids), strict=True):
            written = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            tokens += written
            answers[i] = Answer(text, finish_reason="length" if written >= longest else "stop")
        note(f"{min(at + CHUNK, len(order)):,} of {len(order):,} questions answered here")
    return HereAnswers(answers, time.perf_counter() - started, tokens)


def _prompt(tuned: TunedModel, question: Question) -> list[int] | str:
    """The tokens that are given, as in training; or why there are none."""
    renderer = tuned.renderer
    if question.prompt:
        return renderer.encode_prompt(question.prompt, begin=True)
    try:
        return renderer.encode_prompt(renderer.prompt(renderer.with_system(question.messages), question.tools))
    except DataError as error:
        return error.message
