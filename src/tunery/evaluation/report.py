"""report.html: one self-contained page on a run, to show around.

Everything on it is read from the run directory (metrics.jsonl, evaluation.json, receipt.json, task.yaml). What is not
there is left out or said to be missing; the page needs no network, no script and no font of its own.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from tunery.evaluation.cautions import cautions
from tunery.evaluation.charts import Interval, Series, interval_chart, line_chart, smooth
from tunery.evaluation.mistakes import SHOWN, mistakes
from tunery.evaluation.page import render_page
from tunery.evaluation.private_paths import without_paths
from tunery.evaluation.proof import checks, facts, hashes, reproduction, tensor_rows, warnings_of
from tunery.evaluation.record import (
    RunRecord,
    as_number,
    compares_answers,
    headline,
    interval_of,
    items,
    judges_answers,
    listed,
    metric_rows,
    pick,
    read_run,
    show,
    unit_of,
)
from tunery.jsonl import JsonMapping
from tunery.paths import RunPaths, write_atomic
from tunery.training.advice import advise
from tunery.training.metrics import metric_lines, training_lines, validation_lines

LARGEST_MATRIX = 20
"""With more labels than this, the most frequent confusions are listed instead of the matrix."""
LONG_PROMPT = 320
"""Characters beyond which a prompt is folded."""


_TOKEN_COLUMNS = (("valid_token_accuracy", "Tokens predicted right", "percent"),)
_PAIR_COLUMNS = (
    ("valid_rewards_margin", "Reward margin", "score"),
    ("valid_rewards_accuracy", "Reward accuracy", "percent"),
)
"""What a table of validations says besides the loss: (key in metrics.jsonl, heading, form)."""


def _curves(record: RunRecord) -> dict[str, object]:
    """The charts, each in a wide and a narrow version (the page shows one by the width of the screen)."""
    train, valid = training_lines(record.metrics), validation_lines(record.metrics)
    rates = [
        (line["step"], line["learning_rate"])
        for line in record.metrics
        if as_number(line.get("step")) is not None and as_number(line.get("learning_rate")) is not None
    ]
    rewards = [metric_lines(record.metrics, f"rewards_{answer}") for answer in ("chosen", "rejected")]
    judged = any(as_number(line.get("valid_rewards_margin")) is not None for line in record.metrics)
    more = _PAIR_COLUMNS if judged else _TOKEN_COLUMNS
    averaged = smooth(train)
    series = [
        Series("training, each step", train, 1, "faint"),
        Series("training, averaged", averaged, 1),
        Series("validation", valid, 2, "dots"),
    ]
    values = [loss for _, loss in (*averaged, *valid)]
    log_y = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
    best = min(valid, key=lambda pair: pair[1], default=None)
    marks = [(best[0], f"best: step {best[0]}")] if best and len(valid) > 1 else []

    def loss(width: int, height: int, kind: str) -> str:
        title = f"Loss over {len(train)} logged steps" + (" (logarithmic)" if log_y else "")
        return line_chart(
            series, title=title, x_label="step", width=width, height=height, log_y=log_y, marks=marks, kind=kind
        )

    def rate(width: int, height: int, kind: str) -> str:
        shown = [Series("learning rate", rates, 1)]
        return line_chart(shown, title="Learning rate", x_label="step", width=width, height=height, kind=kind)

    def reward(width: int, height: int, kind: str) -> str:
        shown = [Series("preferred", smooth(rewards[0]), 1), Series("rejected", smooth(rewards[1]), 2)]
        title = "Rewards of preferred and rejected answers, averaged"
        return line_chart(shown, title=title, x_label="step", width=width, height=height, kind=kind)

    return {
        "any": bool(train or valid),
        "loss": [loss(960, 340, "chart wide"), loss(380, 300, "chart narrow")],
        "rate": [rate(960, 150, "chart wide"), rate(380, 160, "chart narrow")] if rates else [],
        "log": log_y,
        "pairs": bool(rewards[0]),
        "judged": judged,
        "rewards": [reward(960, 240, "chart wide"), reward(380, 220, "chart narrow")] if rewards[0] else [],
        "columns": ["Step", "Epoch", "Validation loss", *(name for _, name, _ in more)],
        "validations": [
            [
                show(pick(line, "step"), "count"),
                show(pick(line, "epoch"), "loss"),
                show(pick(line, "valid_loss"), "score"),
                *(show(pick(line, key), form) for key, _, form in more),
            ]
            for line in record.metrics
            if as_number(line.get("valid_loss")) is not None
        ],
    }


def _interval_charts(evaluation: JsonMapping) -> list[str]:
    rows = [
        Interval(name, *found, color=color)
        for side, name, color in (("base", "base", 3), ("tuned", "tuned", 1))
        if (found := interval_of(evaluation, side))
    ]
    if not rows:
        return []
    low = max(0.0, math.floor(min(row.low for row in rows) * 10) / 10)
    high = min(1.0, math.ceil(max(row.high for row in rows) * 10) / 10)
    what = "Share of pairs whose preferred answer is likelier," if compares_answers(evaluation) else "Accuracy of"
    title = f"{what} base and tuned model with 95% intervals"
    return [
        interval_chart(rows, title=title, low=low, high=high, width=width, kind=kind)
        for width, kind in ((960, "chart wide"), (380, "chart narrow"))
    ]


def _per_label(evaluation: JsonMapping) -> list[dict[str, object]]:
    tuned, base = pick(evaluation, "tuned", "per_label"), pick(evaluation, "base", "per_label")
    names = list(dict.fromkeys([name for name, _ in (*items(tuned), *items(base))]))
    return [
        {
            "name": name,
            "support": show(pick(tuned, name, "support") or pick(base, name, "support"), "count"),
            "values": [
                (show(pick(base, name, key), "percent"), show(pick(tuned, name, key), "percent"))
                for key in ("precision", "recall", "f1")
            ],
        }
        for name in names
    ]


def _matrices(evaluation: JsonMapping) -> list[dict[str, object]]:
    """Confusion matrices of base and tuned, each cell with its fraction of the row (for the shade)."""
    labels = [str(label) for label in listed(pick(evaluation, "labels"))]
    found = []
    for side in ("base", "tuned"):
        rows = [
            [as_number(cell) or 0 for cell in listed(row)][: len(labels)]
            for row in listed(pick(evaluation, side, "confusion"))[: len(labels)]
        ]
        if not labels or not rows:
            continue
        mistakes = [
            (count, labels[truth], labels[chosen])
            for truth, row in enumerate(rows)
            for chosen, count in enumerate(row)
            if truth != chosen and count
        ]
        found.append(
            {
                "name": side,
                "labels": labels,
                "small": len(labels) <= LARGEST_MATRIX,
                "rows": [
                    (label, [(f"{cell:,.0f}", cell / (sum(row) or 1)) for cell in row])
                    for label, row in zip(labels, rows, strict=False)
                ],
                "mistakes": sorted(mistakes, key=lambda item: -item[0])[:LARGEST_MATRIX],
            }
        )
    return found


def _samples(evaluation: JsonMapping) -> list[dict[str, object]]:
    """The answers side by side, each with whether it is the reference's (None unless it is a classifier's)."""
    shown = []
    for sample in listed(pick(evaluation, "samples")):
        text = {key: pick(sample, key) for key in ("where", "prompt", "reference", "rejected", "base", "tuned")}
        text = {key: "" if value is None else str(value) for key, value in text.items()}
        exact = bool(listed(pick(evaluation, "labels")))
        shown.append(
            {
                **text,
                "long": len(text["prompt"]) > LONG_PROMPT,
                "answers": [
                    (name, text[side], _label_of(text[side]) == text["reference"].strip() if exact else None)
                    for name, side in (("base", "base"), ("tuned", "tuned"))
                ],
            }
        )
    return shown


def _label_of(answer: str) -> str:
    """A classifier's answer without the probability after it: "positive (98%)" → "positive"."""
    return re.sub(r" \(\d+%\)$", "", answer.strip())


def _big_numbers(evaluation: JsonMapping) -> list[dict[str, object]]:
    """The two or three metrics that tell most, with the uncertainty where it is known."""
    wanted = ("loss", "perplexity", "chrf")
    if pick(evaluation, "tuned", "accuracy") is not None:
        wanted = ("accuracy", "macro_f1", "loss")
    elif pick(evaluation, "tuned", "rewards_accuracy") is not None:
        wanted = ("rewards_accuracy", "preference_accuracy", "rewards_margin", "loss")
    rows = {row.metric.key: row for row in metric_rows(evaluation)}
    numbers = []
    for key in [key for key in wanted if key in rows][:3]:
        range_ = interval_of(evaluation, "tuned") if key in ("accuracy", "preference_accuracy") else None
        between = f"95% interval {range_[1]:.1%} to {range_[2]:.1%}" if range_ else rows[key].metric.meaning
        numbers.append({"row": rows[key], "note": between})
    return numbers


def _page(record: RunRecord) -> dict[str, object]:
    evaluation, receipt = record.evaluation, record.receipt

    def shared(text: object) -> str:
        return without_paths(record, str(text), absolute=True)

    wrong = mistakes(record)
    return {
        "name": record.name,
        "model": shared(show(pick(receipt, "model", "name") or pick(receipt, "model", "source"), "words")),
        "created": show(pick(receipt, "created"), "words").replace("T", " ").replace("+00:00", " UTC"),
        "version": show(pick(receipt, "tunery"), "words"),
        "headline": headline(evaluation),
        "numbers": _big_numbers(evaluation),
        "intervals": _interval_charts(evaluation),
        "warnings": [*cautions(evaluation), *map(shared, warnings_of(receipt))],
        "advice": advise(record.metrics),
        "curves": _curves(record),
        "evaluated": bool(evaluation),
        "split": show(pick(evaluation, "split"), "words"),
        "rows": show(pick(evaluation, "rows"), "count"),
        "generated": show(pick(evaluation, "generated_rows"), "count") if pick(evaluation, "generated_rows") else "",
        "unit": unit_of(evaluation),
        "judged": judges_answers(evaluation),
        "labels_read": pick(evaluation, "by") == "generation" and bool(pick(evaluation, "labels")),
        "beta": show(pick(evaluation, "beta"), "rate"),
        "metrics": metric_rows(evaluation),
        "per_label": _per_label(evaluation),
        "matrices": _matrices(evaluation),
        "mistakes": wrong[:SHOWN],
        "mistakes_count": len(wrong),
        "pairs": compares_answers(evaluation),
        "long_prompt": LONG_PROMPT,
        "samples": _samples(evaluation),
        "checks": checks(receipt),
        "facts": [
            (title, [replace(fact, value=shared(fact.value)) for fact in found]) for title, found in facts(receipt)
        ],
        "tensors": tensor_rows(receipt),
        "skipped": [shared(entry) for entry in listed(pick(receipt, "data", "skipped"))],
        "reproduction": reproduction(record),
        "hashes": [replace(digest, file=shared(digest.file)) for digest in hashes(record)],
        "task_yaml": shared(record.task_yaml),
        "receipt_sha256": record.receipt_sha256,
    }


def render_report(run_dir: Path) -> str:
    """The page's HTML text. Every text of the user's is escaped.

    Raises:
        ConfigError: `run_dir` is not a run directory.
        CheckpointError: a file in it is damaged.
    """
    return render_page("report.html.jinja", _page(read_run(Path(run_dir))))


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run directory and return its path. Raises what `render_report` raises."""
    path = RunPaths(Path(run_dir)).report
    write_atomic(path, render_report(run_dir))
    return path
