"""A run's model answers questions: those of rows, and those that were put to another model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunery.errors import DataError
from tunery.evaluation.answers import Answer, Question
from tunery.inference.generate import Sampling, generate
from tunery.models.windows import context_length
from tunery.progress import Note, Say

if TYPE_CHECKING:
    from tunery.evaluation.tuned import TunedModel

CHUNK = 32
"""Questions answered between two remarks on how far it is."""

TIMED = 5
"""Questions that are answered once more, each alone, to tell how long one takes."""


@dataclass(frozen=True)
class LocalAnswers:
    """Answers in the order of the questions.

    Attributes:
        seconds: of answering them all, many at a time, without loading.
        tokens: written.
        single_seconds: of one answer alone; the median of a few. None where nothing was answered.
    """

    answers: list[Answer]
    seconds: float
    tokens: int
    single_seconds: float | None


def answer_locally(tuned: TunedModel, questions: Sequence[Question], longest: int, note: Say) -> LocalAnswers:
    """Let the tuned model answer, the likeliest token each time.

    Args:
        longest: an answer is cut after so many tokens.
    """
    sampling = Sampling(max_new_tokens=longest)
    prompts, answers = _prompts(tuned, questions, longest)
    started, tokens = time.perf_counter(), 0
    order = sorted(prompts, key=lambda number: len(prompts[number]))
    for at in range(0, len(order), CHUNK):
        part = order[at : at + CHUNK]
        tokens += _answer(tuned, prompts, part, sampling, answers)
        note(Note(f"{min(at + CHUNK, len(order)):,} of {len(order):,} questions answered here"))
    seconds = time.perf_counter() - started
    timed = [_seconds_alone(tuned, prompts[i], sampling) for i in order[:: max(1, len(order) // TIMED)][:TIMED]]
    return LocalAnswers(answers, seconds, tokens, statistics.median(timed) if timed else None)


def answers_of(tuned: TunedModel, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
    """The tuned model's answers to a few questions at a time, in their order."""
    prompts, answers = _prompts(tuned, questions, sampling.max_new_tokens)
    _answer(tuned, prompts, list(prompts), sampling, answers)
    return answers


def _prompts(
    tuned: TunedModel, questions: Sequence[Question], longest: int
) -> tuple[dict[int, list[int]], list[Answer]]:
    """(number of each question that can be asked → its tokens, an answer for each that says why it was not)."""
    room = context_length(tuned.model.config) - longest
    answers = [Answer("", refused="not asked")] * len(questions)
    prompts: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        try:
            ids = _prompt(tuned, question)
        except DataError as error:
            answers[number] = Answer("", refused=error.message)
            continue
        if not 0 < len(ids) <= room:
            context = room + longest
            why = f"the prompt has {len(ids):,} tokens; {context:,} fit, {longest:,} of them for the answer"
            why = why if ids else "the prompt is empty"
            answers[number] = Answer("", refused=why)
        else:
            prompts[number] = ids
    return prompts, answers


def _answer(
    tuned: TunedModel,
    prompts: dict[int, list[int]],
    part: Sequence[int],
    sampling: Sampling,
    answers: list[Answer],
) -> int:
    """Fill in the answers to the questions of these numbers; how many tokens were written."""
    tokenizer, tokens = tuned.base.tokenizer, 0
    texts = generate(tuned.model, tokenizer, [prompts[i] for i in part], sampling, tuned.renderer.stop_ids)
    for number, text in zip(part, texts, strict=True):
        written = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        tokens += written
        answers[number] = Answer(text, finish_reason="length" if written >= sampling.max_new_tokens else "stop")
    return tokens


def _seconds_alone(tuned: TunedModel, prompt: list[int], sampling: Sampling) -> float:
    started = time.perf_counter()
    generate(tuned.model, tuned.base.tokenizer, [prompt], sampling, tuned.renderer.stop_ids)
    return time.perf_counter() - started


def _prompt(tuned: TunedModel, question: Question) -> list[int]:
    """The tokens that are given, as in training.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    renderer = tuned.renderer
    if not question.messages:
        return renderer.encode_prompt(question.prompt, begin=True)
    return renderer.encode_prompt(renderer.prompt(renderer.with_system(question.messages), question.tools))
