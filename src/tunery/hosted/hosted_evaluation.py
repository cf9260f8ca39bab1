"""Base vs. tuned on a server, by their answers: labels read from them, or their overlap with the reference.

The result has the form of a local run's evaluation.json. What needs the model's own probabilities of given words (loss,
perplexity, rewards) is not in it, because the servers give none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tunery.config import USUAL_OBJECTIVE, EvaluateConfig
from tunery.data.example import DataSet, Example
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import Kind
from tunery.data.prompts import Prompts
from tunery.errors import HostedError
from tunery.evaluation.answers import Answer, AnswerBook, Question, questions
from tunery.evaluation.compare import SIDES, HeldOutResult, telling_rows
from tunery.evaluation.label_reading import NO_LABEL, label_scores, read_label
from tunery.evaluation.scores import text_scores
from tunery.hosted.client import Service, is_local
from tunery.hosted.querying import Asker, ask_all
from tunery.jsonl import JsonObject
from tunery.openai_api.token_counter import TokenCounter
from tunery.progress import Say
from tunery.records.evaluation_record import VERSION, Evaluation
from tunery.records.prediction_record import HeldOutPrediction

USAGE = ("prompt_tokens", "completion_tokens")


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


def evaluate(
    service: Service,
    book: AnswerBook,
    exam: Exam,
    names: dict[str, str],
    config: EvaluateConfig,
    parallel: int,
    note: Say,
) -> HeldOutResult:
    """Ask both sides and score what they say.

    Args:
        names: "base" and "tuned" → the model's name on the server.

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
    evaluation = Evaluation.of(
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
    return HeldOutResult(evaluation, [_prediction(exam, asked[i], answers, i) for i in range(len(asked))])


def _prediction(exam: Exam, asked: Question, answers: dict[str, list[str]], number: int) -> HeldOutPrediction:
    """What both sides say of a question: the label that is read from it, where there is one, or all of it."""
    said = {side: answers[side][number] for side in SIDES}
    read = {side: read_label(text, exam.labels) or text for side, text in said.items()} if exam.labels else said
    rejected = {"rejected": asked.rejected} if asked.rejected else {}
    values = {"where": asked.where, "input": asked.shown, "expected": asked.reference, **rejected, **read}
    return HeldOutPrediction.of(values)


def _nothing_to_compare(said: dict[str, list[Answer]]) -> HostedError:
    refusals = [answer.refused for answers in said.values() for answer in answers if answer.refused]
    why = refusals[0] if refusals else "they called tools instead"
    return HostedError(
        f"no question was answered with a text by both models: {why}", "see answers.jsonl in the run directory"
    )


def _answering(answers: Sequence[Answer]) -> JsonObject:
    """Time and tokens of one side's answers."""
    return {
        "median_seconds": statistics.median(answer.seconds for answer in answers),
        "cut": sum(answer.finish_reason == "length" for answer in answers),
        **{name: sum(answer.usage.get(name, 0) for answer in answers) for name in USAGE},
    }


def _classification(
    exam: Exam, asked: Sequence[Question], answers: dict[str, list[str]], config: EvaluateConfig, counter: TokenCounter
) -> JsonObject:
    labels = exam.labels
    read = {side: [read_label(text, labels) for text in answers[side]] for side in SIDES}
    truth = [question.reference for question in asked]
    shown = labels if all(None not in found for found in read.values()) else (*labels, NO_LABEL)
    result: JsonObject = {"labels": list(shown)}
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


def _text(
    exam: Exam, asked: Sequence[Question], answers: dict[str, list[str]], config: EvaluateConfig, counter: TokenCounter
) -> JsonObject:
    references = [counter.first(question.reference, config.max_new_tokens) for question in asked]
    result: JsonObject = {"generated_rows": len(asked)}
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
