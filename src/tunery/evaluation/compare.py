"""Base vs. tuned on held-out rows: one model in memory, the adapter switched off and on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunery.config import EvaluateConfig
from tunery.data.batching import Row
from tunery.data.example import Example
from tunery.data.kinds.base import Kind
from tunery.data.prepare import Rows
from tunery.data.render import Renderer
from tunery.errors import DataError
from tunery.evaluation.labels import label_rows, score_labels
from tunery.evaluation.scores import classification_scores, text_scores
from tunery.fast.packed_model import PackedModel
from tunery.inference.generate import Sampling, generate
from tunery.jsonl import JsonObject, encode_line
from tunery.lora.attach import disabled
from tunery.models.windows import context_length
from tunery.paths import predictions_beside, write_atomic
from tunery.progress import Note, Say
from tunery.records.evaluation_record import VERSION, Evaluation, EvaluationSample, Metrics
from tunery.records.prediction_record import HeldOutPrediction
from tunery.training.objectives.base import Objective, loss_metrics
from tunery.training.scoring import Scorer, Scores

SIDES = ("base", "tuned")


@dataclass(frozen=True)
class HeldOut:
    """Rows no training step has seen.

    Attributes:
        split: "validation", "test", or the name of a file.
        kind: of the rows.
        limit: the longest row, in tokens.
        too_long: what happens to a longer one (`data.too_long`).
        objective: that of the training.
    """

    split: str
    kind: Kind
    examples: Sequence[Example]
    rows: Rows
    renderer: Renderer
    limit: int
    too_long: str
    objective: Objective


@dataclass(frozen=True)
class HeldOutResult:
    """What both sides make of held-out rows: together, and of each row."""

    evaluation: Evaluation
    predictions: Sequence[HeldOutPrediction]

    def write(self, target: Path) -> None:
        """To an evaluation file and the predictions beside it. Where the former is there, so is the latter."""
        lines = (encode_line(prediction.as_json()) for prediction in self.predictions)
        write_atomic(predictions_beside(target), "".join(lines))
        self.evaluation.write(target)


def compare(score: Scorer, held_out: HeldOut, config: EvaluateConfig, note: Say) -> HeldOutResult:
    """Measure the base and the tuned model alike.

    Args:
        score: of the model, with the adapter to judge active.
        note: told what is being done.

    Raises:
        DataError: there are no held-out rows.
    """
    if not held_out.rows.rows:
        raise DataError("there is no held-out row to evaluate on", "set data.validation or data.test")
    started = time.perf_counter()
    measure = _label_measures if held_out.kind.labelled else _answer_measures
    measured = measure(score, held_out, config, note)
    evaluation = Evaluation(
        version=VERSION,
        kind=held_out.kind.name,
        objective=held_out.objective.name,
        unit=held_out.objective.noun,
        split=held_out.split,
        rows=measured.rows,
        base=measured.sides["base"],
        tuned=measured.sides["tuned"],
        samples=measured.samples,
        seconds=round(time.perf_counter() - started, 2),
        **measured.more,
    )
    return HeldOutResult(evaluation, measured.predictions)


@dataclass(frozen=True)
class _Measured:
    """What both sides make of so many rows.

    Attributes:
        predictions: one for each row (or pair).
        more: fields of the Evaluation that not every kind of rows has.
    """

    rows: int
    sides: dict[str, Metrics]
    samples: list[EvaluationSample]
    predictions: list[HeldOutPrediction]
    more: JsonObject


def _side(model: PackedModel, side: str) -> contextlib.AbstractContextManager[None]:
    return disabled(model.model) if side == "base" else contextlib.nullcontext()


def _label_measures(score: Scorer, held_out: HeldOut, config: EvaluateConfig, note: Say) -> _Measured:
    labels = held_out.renderer.labels
    examples = held_out.examples[: config.max_rows]
    given = label_rows(held_out.renderer, examples, held_out.limit, held_out.too_long)
    left_out = len(examples) - len(given.examples)
    if left_out:
        note(Note(f"{left_out:,} held-out rows are too long and left out"))
    sides: dict[str, Metrics] = {}
    said: dict[str, list[tuple[str, float]]] = {}
    right: dict[str, list[bool]] = {}
    for side in SIDES:
        note(Note(f"scoring {len(given.examples):,} rows with the {side} model"))
        with _side(score.model, side):
            scores = score_labels(score, given, len(labels))
        predicted, share = scores.predicted, scores.probability
        right[side] = (predicted == given.truth).tolist()
        judged = classification_scores(given.truth.tolist(), predicted.tolist(), labels)
        sides[side] = Metrics.of({**loss_metrics(scores.loss), **judged})
        said[side] = [(labels[k], float(share[i, k])) for i, k in enumerate(predicted)]
    measured = [held_out.examples[number] for number in given.examples]
    samples = [
        EvaluationSample(
            where=measured[i].where,
            prompt=measured[i].text,
            reference=measured[i].label,
            **{side: "{} ({:.0%})".format(*said[side][i]) for side in SIDES},
        )
        for i in telling_rows(right, config.samples)
    ]
    predictions = [
        HeldOutPrediction.of(
            {
                "where": example.where,
                "input": example.text,
                "expected": example.label,
                **{side: said[side][i][0] for side in SIDES},
                **{f"{side}_probability": said[side][i][1] for side in SIDES},
            }
        )
        for i, example in enumerate(measured)
    ]
    return _Measured(len(measured), sides, samples, predictions, {"left_out": left_out, "labels": list(labels)})


def telling_rows(right: Mapping[str, Sequence[bool]], wanted: int) -> list[int]:
    """Rows to show: evenly from those only the tuned model gets right, those only the base gets right, and the rest.

    Args:
        right: side → whether it is right, row by row.
    """
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, pair in enumerate(zip(right["base"], right["tuned"], strict=True)):
        kinds.setdefault(pair, []).append(i)
    queues = [kinds.get(key, []) for key in ((False, True), (True, False), (True, True), (False, False))]
    chosen = [queue[n] for n in range(wanted) for queue in queues if n < len(queue)]
    return sorted(chosen[:wanted])


@dataclass(frozen=True)
class _Question:
    """A held-out row put to the model: the tokens it is given, where the row stands, and what should follow."""

    ids: list[int]
    where: str
    reference: str
    example: int


def _questions(model: PackedModel, held_out: HeldOut, rows: Sequence[Row], config: EvaluateConfig) -> list[_Question]:
    room = context_length(model.model.config) - config.max_new_tokens
    asked = (_ask(held_out, row, room, config.max_new_tokens) for row in _one_per_example(rows)[: config.generate_rows])
    return [question for question in asked if question]


def _answers(
    model: PackedModel, held_out: HeldOut, questions: Sequence[_Question], config: EvaluateConfig
) -> tuple[list[str], dict[str, float]]:
    """(generated answers, their scores against the references)."""
    if not questions:
        return [], {}
    renderer, sampling = held_out.renderer, Sampling(max_new_tokens=config.max_new_tokens)
    prompts = [question.ids for question in questions]
    answers = generate(model.model, renderer.tokenizer, prompts, sampling, renderer.stop_ids)
    return answers, text_scores(answers, [question.reference for question in questions])


def _samples(
    held_out: HeldOut,
    questions: Sequence[_Question],
    answers: dict[str, list[str]],
    rejected: Mapping[int, Row],
    config: EvaluateConfig,
) -> list[EvaluationSample]:
    """The first questions with both answers.

    Args:
        rejected: the row with the worse answer, of the examples that have one.
    """
    samples = []
    for i, question in enumerate(questions[: config.samples]):
        sample = EvaluationSample(
            where=question.where,
            prompt=_decoded(held_out, np.asarray(question.ids)),
            reference=question.reference,
            **{side: answers[side][i] for side in SIDES},
        )
        if question.example in rejected:
            sample.rejected = _answer_text(held_out, rejected[question.example], config.max_new_tokens)[1]
        samples.append(sample)
    return samples


def _answer_measures(score: Scorer, held_out: HeldOut, config: EvaluateConfig, note: Say) -> _Measured:
    model, objective = score.model, held_out.objective
    rows = held_out.rows.first(config.max_rows)
    wanted = [row for row in rows if row.desirable is not False]
    questions = _questions(model, held_out, wanted, config)
    units = len(rows) // objective.unit
    answers: dict[str, list[str]] = {}
    scores: dict[str, Scores] = {}
    sides: dict[str, Metrics] = {}
    for side in SIDES:
        note(Note(f"measuring {units:,} {objective.noun}s and writing {len(questions)} answers with the {side} model"))
        with _side(model, side):
            scores[side] = score(rows)
            answers[side], overlap = _answers(model, held_out, questions, config)
        judged = {**objective.judge(scores[side], scores["base"], rows), **overlap}
        if side == "base":
            for name in ("rewards_accuracy", "rewards_accuracy_interval"):  # the base's rewards are all zero
                judged.pop(name, None)
        sides[side] = Metrics.of(judged)
    rejected = {row.example: row for row in rows if row.desirable is False}
    samples = _samples(held_out, questions, answers, rejected, config)
    generated = {side: dict(zip((q.example for q in questions), answers[side], strict=True)) for side in SIDES}
    predictions = _predictions(held_out, rows, scores, generated)
    return _Measured(units, sides, samples, predictions, {"generated_rows": len(questions), **objective.settings()})


def _predictions(
    held_out: HeldOut, rows: Sequence[Row], scores: Mapping[str, Scores], generated: Mapping[str, Mapping[int, str]]
) -> list[HeldOutPrediction]:
    """What both sides make of each example.

    Args:
        scores: side → of all rows.
        generated: side → example → answer, where one was generated.
    """
    found: dict[int, JsonObject] = {}
    for at, row in enumerate(rows):
        start, answer = _answer_text(held_out, row, None)
        line = found.setdefault(row.example, {"where": row.where})
        line["input"] = _decoded(held_out, row.ids[:start])
        line["rejected" if row.desirable is False else "expected"] = answer
        for side in SIDES:
            key = f"{side}_{'rejected_' if row.desirable is False else ''}log_probability"
            line[key] = line.get(key, 0.0) + float(scores[side].log_probability[at])
            if row.example in generated[side]:
                line[side] = generated[side][row.example]
    return [HeldOutPrediction.of(line) for line in found.values()]


def _one_per_example(rows: Sequence[Row]) -> list[Row]:
    """The last row of each example: the one that ends with its last answer."""
    return list({row.example: row for row in rows}.values())


def _ask(held_out: HeldOut, row: Row, room: int, longest: int) -> _Question | None:
    """What stands before a row's last answer, and that answer's first tokens.

    None where the row has no prompt or no answer, or where the prompt has more than `room` tokens.
    """
    start, reference = _answer_text(held_out, row, longest)
    if not 0 < start <= room or not reference.strip():
        return None
    return _Question(row.ids[:start].tolist(), row.where, reference, row.example)


def _answer_text(held_out: HeldOut, row: Row, longest: int | None) -> tuple[int, str]:
    """(where a row's last answer starts, the text of its first `longest` tokens; None: of all)."""
    start, last = held_out.kind.answer_start(row.weights), int(np.flatnonzero(row.weights)[-1])
    return start, _decoded(held_out, row.ids[start : last + 1][:longest])


def _decoded(held_out: HeldOut, ids: np.ndarray) -> str:
    return str(held_out.renderer.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
