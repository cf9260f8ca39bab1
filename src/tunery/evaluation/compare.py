"""Base against tuned on held-out rows: one model in memory, the adapter switched off and on."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunery.config import EvaluateConfig, Kind
from tunery.data.batching import Row
from tunery.data.example import Example
from tunery.data.prepare import Rows
from tunery.data.render import Renderer
from tunery.errors import DataError
from tunery.evaluation.generate import Sampling, context_length, generate
from tunery.evaluation.labels import label_rows, score_labels
from tunery.evaluation.scores import classification_scores, text_scores
from tunery.lora.attach import disabled
from tunery.models.flat import FlatModel
from tunery.training.loss import mean_loss

SIDES = ("base", "tuned")

CONTINUE_AFTER = 32
"""Kind text: tokens given before the model writes on."""


@dataclass(frozen=True)
class HeldOut:
    """Rows no training step has seen.

    Attributes:
        split: "validation", "test", or the name of a file.
        limit: the longest row, in tokens.
        too_long: what happens to a longer one (`data.too_long`).
    """

    split: str
    kind: Kind
    examples: Sequence[Example]
    rows: Rows
    renderer: Renderer
    limit: int
    too_long: str = "cut"


def compare(model: FlatModel, held_out: HeldOut, config: EvaluateConfig, note: Callable[[str], None]) -> dict[str, Any]:
    """Measure the base and the tuned model alike.

    Args:
        model: with the adapter to judge active.
        note: told what is being done.

    Returns:
        The content of evaluation.json.

    Raises:
        DataError: there are no held-out rows.
    """
    if not held_out.rows.rows:
        raise DataError("there is no held-out row to evaluate on", "set data.validation or data.test")
    started = time.perf_counter()
    measure = _classification if held_out.kind == "classification" else _text
    result = measure(model, held_out, config, note)
    return {
        "kind": held_out.kind,
        "split": held_out.split,
        **result,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _side(model: FlatModel, side: str) -> contextlib.AbstractContextManager[Any]:
    return disabled(model.model) if side == "base" else contextlib.nullcontext()


def _loss_scores(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _classification(
    model: FlatModel, held_out: HeldOut, config: EvaluateConfig, note: Callable[[str], None]
) -> dict[str, Any]:
    labels = held_out.renderer.labels
    examples = held_out.examples[: config.max_rows]
    given = label_rows(held_out.renderer, examples, held_out.limit, held_out.too_long)
    left_out = len(examples) - len(given.examples)
    if left_out:
        note(f"{left_out:,} held-out rows are too long and left out")
    result: dict[str, Any] = {"rows": len(given.examples), "left_out": left_out, "labels": list(labels)}
    said: dict[str, list[str]] = {}
    for side in SIDES:
        note(f"scoring {len(given.examples):,} rows with the {side} model")
        with _side(model, side):
            scores = score_labels(model, given, len(labels))
        predicted, share = scores.predicted, scores.probability
        judged = classification_scores(given.truth.tolist(), predicted.tolist(), labels)
        result[side] = {**_loss_scores(scores.loss), **judged}
        said[side] = [f"{labels[k]} ({share[i, k]:.0%})" for i, k in enumerate(predicted)]
    chosen = _telling_rows(said, [labels[t] for t in given.truth], config.samples)
    result["samples"] = [
        {
            "where": (example := held_out.examples[given.examples[i]]).where,
            "prompt": example.text,
            "reference": example.label,
            **{side: said[side][i] for side in SIDES},
        }
        for i in chosen
    ]
    return result


def _telling_rows(said: dict[str, list[str]], truth: list[str], wanted: int) -> list[int]:
    """Rows to show: evenly from those only the tuned model gets right, those only the base gets right, and the rest."""

    def right(side: str, i: int) -> bool:
        return said[side][i].rsplit(" (", 1)[0] == truth[i]

    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i in range(len(truth)):
        kinds.setdefault((right("base", i), right("tuned", i)), []).append(i)
    queues = [kinds.get(key, []) for key in ((False, True), (True, False), (True, True), (False, False))]
    chosen = [queue[n] for n in range(wanted) for queue in queues if n < len(queue)]
    return sorted(chosen[:wanted])


def _text(model: FlatModel, held_out: HeldOut, config: EvaluateConfig, note: Callable[[str], None]) -> dict[str, Any]:
    rows: list[Row] = held_out.rows.rows[: config.max_rows]
    room = context_length(model.model) - config.max_new_tokens
    asked = [
        pair
        for row in _one_per_example(rows)[: config.generate_rows]
        if (pair := _ask(held_out, row, room, config.max_new_tokens))
    ]
    prompts, references = [ids for ids, _, _ in asked], [reference for _, _, reference in asked]
    tokenizer = held_out.renderer.tokenizer
    stop_ids = held_out.renderer.stop_ids
    result: dict[str, Any] = {"rows": len(rows), "generated_rows": len(asked)}
    answers: dict[str, list[str]] = {}
    for side in SIDES:
        note(f"measuring {len(rows):,} rows and writing {len(asked)} answers with the {side} model")
        with _side(model, side):
            loss, accuracy = mean_loss(model, rows)
            sampling = Sampling(max_new_tokens=config.max_new_tokens)
            answers[side] = generate(model.model, tokenizer, prompts, sampling, stop_ids) if asked else []
        overlap = text_scores(answers[side], references) if asked else {}
        result[side] = {**_loss_scores(loss), "token_accuracy": accuracy, **overlap}
    result["samples"] = [
        {
            "where": asked[i][1],
            "prompt": tokenizer.decode(prompts[i], skip_special_tokens=True),
            "reference": references[i],
            **{side: answers[side][i] for side in SIDES},
        }
        for i in range(min(config.samples, len(asked)))
    ]
    return result


def _one_per_example(rows: Sequence[Row]) -> list[Row]:
    """The last row of each example: the one that ends with its last answer."""
    return list({row.example: row for row in rows}.values())


def _ask(held_out: HeldOut, row: Row, room: int, longest: int) -> tuple[list[int], str, str] | None:
    """(prompt ids, where, reference) of a row: what stands before its last answer, and that answer's first tokens.

    None where the row has no prompt or no answer, or where the prompt has more than `room` tokens.
    """
    tokenizer = held_out.renderer.tokenizer
    trained = np.flatnonzero(row.weights)
    if held_out.kind == "text":
        start = min(CONTINUE_AFTER, len(row.ids) // 2)
    else:
        breaks = np.flatnonzero(np.diff(trained) > 1)
        start = int(trained[breaks[-1] + 1] if len(breaks) else trained[0])
    reference = tokenizer.decode(row.ids[start : trained[-1] + 1][:longest].tolist(), skip_special_tokens=True)
    if not 0 < start <= room or not str(reference).strip():
        return None
    return row.ids[:start].tolist(), row.where, str(reference)
