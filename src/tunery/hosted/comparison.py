"""A run here compared with the hosted model that it replaces: side-by-side.json and side-by-side.html."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tunery.errors import ConfigError
from tunery.evaluation.agreement import Pair, compare_sides
from tunery.evaluation.answers import Answered
from tunery.evaluation.charts import Interval, interval_chart
from tunery.evaluation.local_answers import LocalAnswers, answer_locally
from tunery.evaluation.page import render_page
from tunery.evaluation.record import METRICS, NOTHING, as_number, items, show
from tunery.evaluation.report import LONG_PROMPT
from tunery.evaluation.tuned import TunedModel
from tunery.hosted.capture import Capture
from tunery.hosted.querying import ANSWERS_LONGEST
from tunery.hosted.task_from_job import MovedRows, learnt_here, mapping
from tunery.jsonl import JsonMapping, JsonObject
from tunery.openai_api.methods import settled_hyperparameters
from tunery.paths import RunPaths, write_atomic, write_json
from tunery.progress import Say
from tunery.records.evaluation_record import Evaluation
from tunery.records.run_receipt import AnyReceipt, Receipt
from tunery.versions import version_of

PAGE = "side-by-side.html"

_EXACT = (
    "exact",
    "Same as the reference",
    "percent",
    "fraction of answers that are the reference, but for white space",
)

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


def compare_with_hosted(
    capture: Capture, rows: MovedRows, answered: Sequence[Answered], run: Finished, tuned: TunedModel, note: Say
) -> JsonObject:
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
    here = answer_locally(tuned, [question for question, _ in answered], longest, note)
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


def _origin(capture: Capture) -> JsonObject:
    job = capture.job
    kept = ("id", "model", "fine_tuned_model", "created_at", "finished_at", "trained_tokens", "seed", "metadata")
    return {
        "address": capture.address,
        **{key: job.get(key) for key in kept},
        "method": (job.get("method") or {}).get("type"),
        "hyperparameters": settled_hyperparameters(job),
    }


def _target(run: Finished, tuned: TunedModel) -> JsonObject:
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
        "device": receipt.device.as_json(),
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


def _warnings(pairs: Sequence[Pair], here: LocalAnswers, answered: int) -> list[str]:
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


# --------------------------------------------------------------------------- side-by-side.html


def write_side_by_side(run: Path, result: JsonMapping) -> Path:
    """Write the page into a run directory and return its path."""
    path = run / PAGE
    write_atomic(path, render_page("side-by-side.html.jinja", page_values(result), package="tunery.hosted"))
    return path


def page_values(result: JsonMapping) -> JsonObject:
    """What the template is filled with, besides the result itself."""
    return {
        "result": result,
        "show": show,
        "long_prompt": LONG_PROMPT,
        "hosted": result["from"]["fine_tuned_model"] or result["from"]["model"] or "the hosted model",
        "created": result["created"].replace("T", " ").replace("+00:00", " UTC"),
        "headline": side_headline(result),
        "numbers": _numbers(result),
        "intervals": _intervals(result),
        "metrics": score_rows(result),
        "certainty": result.get("certainty"),
        "between": result.get("between"),
        "facts": _facts(result["from"], result["to"], result["speed"]),
    }


def side_headline(result: JsonMapping) -> str:
    """One plain sentence on how near the two are."""
    rows, agreement = show(result["rows"], "count"), result["agreement"]
    if "label" in agreement:
        share = agreement["label"]["share"]
        said = f"The model trained here gives the hosted model's label to {share:.1%} of {rows} questions."
        theirs, ours = (result[side].get("accuracy") for side in ("hosted", "local"))
        if theirs is not None and ours is not None:
            said += f" By the references, {ours:.1%} of its labels are right, and {theirs:.1%} of the other's."
        return said
    return (
        f"On {rows} questions the model trained here gives the hosted model's very answer "
        f"{agreement['exact']['share']:.1%} of the time; its answers overlap with the other's by "
        f"{agreement['chrf']:.1f} of 100 points (chrF)."
    )


def _numbers(result: JsonMapping) -> list[tuple[str, str, str]]:
    """(name, value, what it is) of the figures at the top."""
    agreement, speed = result["agreement"], result["speed"]
    key, name = ("label", "Same label") if "label" in agreement else ("exact", "Same answer")
    low, high = agreement[key]["interval"]
    there = speed["hosted_seconds"]
    return [
        (name, f"{agreement[key]['share']:.1%}", f"95% interval {low:.1%} to {high:.1%}"),
        (
            "chrF between them",
            show(agreement["chrf"], "points"),
            "overlap of the local answers with the hosted ones, 0 to 100",
        ),
        (
            "Seconds for one answer, here",
            show(speed["local_seconds"], "rate"),
            "the other's are not known" if there is None else f"{show(there, 'rate')} there, the network included",
        ),
    ]


def score_rows(result: JsonMapping) -> list[tuple[str, str, str, str]]:
    """(metric, hosted, local, what it is) of every score that either side has, by the references."""
    known = [(m.key, m.name, m.form, m.meaning) for m in METRICS]
    return [
        (name, show(hosted, form), show(local, form), meaning)
        for key, name, form, meaning in (_EXACT, *known)
        for hosted, local in [(result["hosted"].get(key), result["local"].get(key))]
        if as_number(hosted) is not None or as_number(local) is not None
    ]


def _intervals(result: JsonMapping) -> list[str]:
    key, title = ("exact", "Answers like the reference")
    if "accuracy" in result["hosted"]:
        key, title = "accuracy", "Accuracy"
    rows = [
        Interval(side, result[side][key], *result[side][f"{key}_interval"], color=color)
        for side, color in (("hosted", 3), ("local", 1))
        if key in result[side]
    ]
    if not rows:
        return []
    low = max(0.0, math.floor(min(row.low for row in rows) * 10) / 10)
    high = min(1.0, math.ceil(max(row.high for row in rows) * 10) / 10)
    return [
        interval_chart(rows, title=f"{title}, with 95% intervals", low=low, high=high, width=width, kind=kind)
        for width, kind in ((960, "chart wide"), (380, "chart narrow"))
    ]


def _facts(there: JsonMapping, here: JsonMapping, speed: JsonMapping) -> list[tuple[str, list[tuple[str, str]]]]:
    done = there["finished_at"]
    groups = [
        (
            "There",
            [
                ("Server", there["address"], "words"),
                ("Job", there["id"], "words"),
                ("Base", there["model"], "words"),
                ("Tuned model", there["fine_tuned_model"], "words"),
                ("Trained", done and datetime.datetime.fromtimestamp(done, datetime.UTC).date().isoformat(), "words"),
                ("Tokens trained", there["trained_tokens"], "count"),
                ("Size", "not published", "words"),
                ("Seconds per answer", speed["hosted_seconds"], "rate"),
                *((str(key), str(value), "words") for key, value in items(there["metadata"])),
            ],
        ),
        (
            "Here",
            [
                ("Base", here["model"], "words"),
                ("Parameters", here["parameters"], "count"),
                ("Adapter parameters", here["trainable_parameters"], "count"),
                ("Adapter file", here["adapter_bytes"], "bytes"),
                ("Dtype", here["dtype"], "words"),
                ("Training", here["train_seconds"], "seconds"),
                ("Memory at the peak", here["peak_bytes"], "bytes"),
                ("Seconds per answer", speed["local_seconds"], "rate"),
                ("Tokens per second, many answers at a time", speed["local_tokens_per_second"], "points"),
            ],
        ),
    ]
    return [
        (title, [(name, text) for name, value, form in facts if (text := show(value, form)) != NOTHING])
        for title, facts in groups
    ]
