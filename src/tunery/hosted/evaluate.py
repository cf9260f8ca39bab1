"""Base vs. tuned on a server, by their answers: labels read from them, or their overlap with the reference.

The result has the form of a local run's evaluation.json. What needs the model's own probabilities of given words (loss,
perplexity, rewards) is not in it, because the servers give none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunery.config import USUAL_OBJECTIVE, EvaluateConfig
from tunery.data.example import DataSet, Example
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import Kind
from tunery.data.prompts import Prompts
from tunery.errors import HostedError
from tunery.evaluation.compare import SIDES, telling_rows
from tunery.evaluation.scores import classification_scores, text_scores
from tunery.hosted.ask import Answer, AnswerBook, Asker, ask_all
from tunery.hosted.client import Service, is_local
from tunery.hosted.questions import Question, questions, read_label
from tunery.hosted.token_counter import TokenCounter
from tunery.progress import Say
from tunery.records.evaluation_record import VERSION, Evaluation

USAGE = ("prompt_tokens", "completion_tokens")

NO_LABEL = "(none of them)"
"""Stands for answers that give no label, or several."""


@dataclass(frozen=True)
class Exam:
    """Held-out rows as questions.

    Attributes:
        split: "validation", "test", or the name of a file.
        kind, labels: of the rows.
        questions: those that are asked.
        left_out: rows that put no question (their answer is a tool call).
    """

    split: str
    kind: Kind
    labels: tuple[str, ...]
    questions: list[Question]
    left_out: int


def make_exam(data: DataSet, split: str, examples: Sequence[Example], prompts: Prompts, config: EvaluateConfig) -> Exam:
    """The questions of an evaluation.

    Every held-out row of a classification is asked (`evaluate.max_rows`), and of other kinds as many as a model trained
    here answers by generating (`evaluate.generate_rows`).
    """
    asked, left_out = questions(examples, prompts)
    kind = KINDS[data.kind]
    limit = config.max_rows if kind.labelled else config.generate_rows
    return Exam(split, kind, data.labels, asked[:limit], left_out)


def held_out(data: DataSet) -> tuple[str, list[Example]]:
    """The rows of the final evaluation, as for a model trained here: test if there are any, else validation."""
    return ("test", data.test) if data.test else ("validation", data.validation)


def evaluate(
    service: Service,
    book: AnswerBook,
    exam: Exam,
    names: dict[str, str],
    config: EvaluateConfig,
    parallel: int,
    note: Say,
) -> Evaluation:
    """Ask both sides and score what they say.

    Args:
        names: "base" and "tuned" → the model's name on the server.

    Returns:
        The content of evaluation.json.

    Raises:
        HostedError: not one question was answered by both sides.
    """
    started = time.perf_counter()
    said: dict[str, list[Answer]] = {}
    for side in SIDES:
        fresh = side == "tuned" and not is_local(service.address)
        asker = Asker(service, names[side], config.max_new_tokens, fresh=fresh)
        said[side] = ask_all(asker, book, exam.questions, parallel, note)
    usable = [i for i in range(len(exam.questions)) if all(said[side][i].is_text for side in SIDES)]
    if not usable:
        raise _nothing_to_compare(said)
    asked = [exam.questions[i] for i in usable]
    answers = {side: [said[side][i].text for i in usable] for side in SIDES}
    judge = _classification if exam.kind.labelled else _text
    return Evaluation.of(
        {
            "version": VERSION,
            "kind": exam.kind.name,
            "objective": USUAL_OBJECTIVE[exam.kind.name],
            "unit": exam.kind.noun,
            "split": exam.split,
            "by": "generation",
            "rows": len(asked),
            "left_out": exam.left_out + len(exam.questions) - len(asked),
            **judge(exam, asked, answers, config, TokenCounter(names["base"])),
            "answering": {side: _answering([said[side][i] for i in usable]) for side in SIDES},
            "seconds": round(time.perf_counter() - started, 2),
        }
    )


def _nothing_to_compare(said: dict[str, list[Answer]]) -> HostedError:
    refusals = [answer.refused for answers in said.values() for answer in answers if answer.refused]
    why = refusals[0] if refusals else "they called tools instead"
    return HostedError(
        f"no question was answered with a text by both models: {why}", "see answers.jsonl in the run directory"
    )


def _answering(answers: Sequence[Answer]) -> dict[str, Any]:
    """Time and tokens of one side's answers."""
    return {
        "median_seconds": statistics.median(answer.seconds for answer in answers),
        "cut": sum(answer.finish_reason == "length" for answer in answers),
        **{name: sum(answer.usage.get(name, 0) for answer in answers) for name in USAGE},
    }


def _classification(
    exam: Exam, asked: Sequence[Question], answers: dict[str, list[str]], config: EvaluateConfig, counter: TokenCounter
) -> dict[str, Any]:
    labels = exam.labels
    read = {side: [read_label(text, labels) for text in answers[side]] for side in SIDES}
    truth = [question.reference for question in asked]
    shown = labels if all(None not in found for found in read.values()) else (*labels, NO_LABEL)
    result: dict[str, Any] = {"labels": list(shown)}
    for side in SIDES:
        result[side] = label_scores(truth, read[side], shown)
    said = {side: [label or text for label, text in zip(read[side], answers[side], strict=True)] for side in SIDES}
    right = {side: [label == true for label, true in zip(read[side], truth, strict=True)] for side in SIDES}
    chosen = telling_rows(right, config.samples)
    result["samples"] = [
        {
            "where": asked[i].where,
            "prompt": asked[i].shown,
            "reference": truth[i],
            **{side: said[side][i] for side in SIDES},
        }
        for i in chosen
    ]
    return result


def label_scores(truth: Sequence[str], read: Sequence[str | None], labels: Sequence[str]) -> dict[str, Any]:
    """As tunery.evaluation.scores.classification_scores, for labels read from answers.

    Args:
        read: the label of each answer; None counts as wrong, under NO_LABEL, which `labels` then ends with.
    """
    numbers = {label: index for index, label in enumerate(labels)}
    scores = classification_scores(
        [numbers[label] for label in truth], [numbers[label or NO_LABEL] for label in read], labels
    )
    real = [label for label in labels if label != NO_LABEL]
    occurring = [scores["per_label"][label]["f1"] for label in real if label in {*truth, *read}]
    return {**scores, "macro_f1": sum(occurring) / len(occurring), "unlabelled": sum(label is None for label in read)}


def _text(
    exam: Exam, asked: Sequence[Question], answers: dict[str, list[str]], config: EvaluateConfig, counter: TokenCounter
) -> dict[str, Any]:
    references = [counter.first(question.reference, config.max_new_tokens) for question in asked]
    result: dict[str, Any] = {"generated_rows": len(asked)}
    for side in SIDES:
        result[side] = text_scores(answers[side], references) if asked else {}
    result["samples"] = [
        {
            "where": question.where,
            "prompt": question.shown,
            "reference": references[i],
            **({"rejected": question.rejected} if question.rejected else {}),
            **{side: answers[side][i] for side in SIDES},
        }
        for i, question in enumerate(asked[: config.samples])
    ]
    return result
