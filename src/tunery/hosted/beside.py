"""A run here put beside the hosted model it is to take the place of: side-by-side.json and the page."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tunery.errors import ConfigError
from tunery.evaluation.tuned import TunedModel
from tunery.hosted.ask import ANSWERS_LONGEST
from tunery.hosted.capture import Capture
from tunery.hosted.equivalent import mapping
from tunery.hosted.given import Answered
from tunery.hosted.here import HereAnswers, answer_here
from tunery.hosted.hosted_receipt import settled_hyperparameters
from tunery.hosted.moved_rows import MovedRows, learnt_here
from tunery.hosted.side_by_side import Pair, compare_sides
from tunery.hosted.side_by_side_page import write_side_by_side
from tunery.paths import RunPaths, write_json
from tunery.progress import Say
from tunery.records.evaluation_record import Evaluation
from tunery.records.run_receipt import AnyReceipt, Receipt
from tunery.versions import version_of

SAMPLES = 24
"""Answers shown side by side."""


class Finished(Protocol):
    """A finished run (tunery.api.Run)."""

    @property
    def path(self) -> Path: ...
    @property
    def receipt(self) -> AnyReceipt: ...
    @property
    def evaluation(self) -> Evaluation | None: ...


def put_beside(
    capture: Capture,
    rows: MovedRows,
    answered: Sequence[Answered],
    run: Finished,
    tuned: TunedModel,
    note: Say,
) -> dict[str, Any]:
    """Let the run's model answer what the hosted one answered, and compare.

    Args:
        answered: questions that the hosted model answered with a text.

    Returns:
        The content of side-by-side.json.

    Raises:
        ConfigError: no question fits into the model's context.
    """
    tokenizer = tuned.base.tokenizer
    written = (len(tokenizer(answer.text, add_special_tokens=False)["input_ids"]) for _, answer in answered)
    longest = max((tuned.task.evaluate.max_new_tokens, *written))  # no shorter than what it is compared with
    here = answer_here(tuned, [question for question, _ in answered], longest, note)
    pairs = [
        Pair(question, hosted, local)
        for (question, hosted), local in zip(answered, here.answers, strict=True)
        if local.is_text
    ]
    if not pairs:
        raise ConfigError("no question fits into the model's context", "choose a base with a longer one, with --to")
    result = {
        "tunery": version_of("tunery"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": capture.name,
        "kind": rows.kind,
        "from": _origin(capture),
        "to": _target(run, tuned),
        "mapping": [list(entry) for entry in mapping(capture, tuned.task, rows.kind)],
        **compare_sides(pairs, rows.labels, SAMPLES),
        "speed": {
            "hosted_seconds": _median([pair.hosted.seconds for pair in pairs if pair.hosted.seconds]),
            "local_seconds": here.single_seconds,
            "local_tokens_per_second": here.tokens / here.seconds if here.seconds else None,
        },
        "own_evaluation": run.evaluation and run.evaluation.as_json(),
    }
    learnt = (("hosted", rows.learnt), ("local", learnt_here(tuned.task)))
    result["warnings"] = [*_learnt(pairs, learnt), *_warnings(pairs, here, len(answered))]
    write_json(RunPaths(run.path).root / "side-by-side.json", result)
    write_side_by_side(run.path, result)
    return result


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _origin(capture: Capture) -> dict[str, Any]:
    job = capture.job
    kept = ("id", "model", "fine_tuned_model", "created_at", "finished_at", "trained_tokens", "seed", "metadata")
    return {
        "address": capture.address,
        **{key: job.get(key) for key in kept},
        "method": (job.get("method") or {}).get("type"),
        "hyperparameters": settled_hyperparameters(job),
    }


def _target(run: Finished, tuned: TunedModel) -> dict[str, Any]:
    receipt = run.receipt
    assert isinstance(receipt, Receipt)  # it was trained here just now
    return {
        "model": tuned.task.model,
        "run": str(run.path),
        "parameters": receipt.model.parameters,
        "trainable_parameters": receipt.lora.trainable_parameters,
        "adapter_bytes": receipt.adapter.bytes,
        "adapter_sha256": receipt.adapter.sha256,
        "dtype": receipt.precision.dtype,
        "device": receipt.device,
        "train_seconds": receipt.speed.train_seconds,
        "peak_bytes": receipt.memory.peak_bytes,
    }


def _learnt(pairs: Sequence[Pair], learnt: Sequence[tuple[str, frozenset[str]]]) -> list[str]:
    """Which model has seen the questions before, with their answers."""
    counts = [(who, sum(pair.question.key in keys for pair in pairs)) for who, keys in learnt]
    return [
        f"{seen:,} of the {len(pairs):,} questions are rows that the {who} model learnt, which flatters it"
        for who, seen in counts
        if seen
    ]


def _warnings(pairs: Sequence[Pair], here: HereAnswers, answered: int) -> list[str]:
    found = []
    if answered > len(pairs):
        found.append(f"{answered - len(pairs):,} questions do not fit into the local model's context and are left out")
    if cut := sum(pair.hosted.finish_reason == "length" for pair in pairs):
        found.append(f"{cut:,} answers of the hosted model were cut at {ANSWERS_LONGEST} tokens")
    if cut := sum(answer.finish_reason == "length" for answer in here.answers):
        found.append(f"{cut:,} answers of the local model were cut at the length of the longest hosted one")
    if len(pairs) < 30:
        found.append(f"{len(pairs)} questions are few: small differences may be chance")
    return found
