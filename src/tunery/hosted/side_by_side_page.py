"""side-by-side.html: one self-contained page on a move, in the look of the reports."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunery.evaluation.charts import Interval, interval_chart
from tunery.evaluation.page import render_page
from tunery.evaluation.record import METRICS, NOTHING, as_number, items, listed, pick, show
from tunery.evaluation.report import LONG_PROMPT
from tunery.paths import write_atomic

Result = Mapping[str, Any]

PAGE = "side-by-side.html"

_EXACT = ("exact", "Same as the reference", "percent", "share of answers that are the reference, but for white space")


def write_side_by_side(run: Path, result: Result) -> Path:
    """Write the page into a run directory and return its path."""
    path = run / PAGE
    write_atomic(path, render_page("side-by-side.html.jinja", page(result), package="tunery.hosted"))
    return path


def page(result: Result) -> dict[str, Any]:
    """What the template is filled with."""
    return {
        "name": show(pick(result, "name"), "words"),
        "hosted": _hosted_name(result),
        "local": show(pick(result, "to", "model"), "words"),
        "created": show(pick(result, "created"), "words").replace("T", " ").replace("+00:00", " UTC"),
        "version": show(pick(result, "tunery"), "words"),
        "headline": headline(result),
        "numbers": _numbers(result),
        "warnings": [str(warning) for warning in listed(pick(result, "warnings"))],
        "rows": show(pick(result, "rows"), "count"),
        "judged": show(pick(result, "with_reference"), "count"),
        "intervals": _intervals(result),
        "metrics": metric_lines(result),
        "certainty": [
            (str(pick(group, "name")), show(pick(group, "share"), "percent"), show(pick(group, "rows"), "count"))
            for group in listed(pick(result, "certainty"))
        ],
        "between": _between(result),
        "samples": _samples(result),
        "mapping": [tuple(map(str, entry)) for entry in listed(pick(result, "mapping"))],
        "facts": _facts(result),
    }


def _hosted_name(result: Result) -> str:
    return show(
        pick(result, "from", "fine_tuned_model") or pick(result, "from", "model") or "the hosted model", "words"
    )


def headline(result: Result) -> str:
    """One plain sentence on how near the two are."""
    rows, label = show(pick(result, "rows"), "count"), as_number(pick(result, "agreement", "label", "share"))
    if label is not None:
        said = f"The model trained here gives the hosted model's label to {label:.1%} of {rows} questions."
        theirs, ours = (pick(result, side, "accuracy") for side in ("hosted", "local"))
        if as_number(theirs) is not None and as_number(ours) is not None:
            right = f"{show(ours, 'percent')} of its labels are right, and {show(theirs, 'percent')} of the other's"
            said += f" By the references, {right}."
        return said
    exact, chrf = pick(result, "agreement", "exact", "share"), pick(result, "agreement", "chrf")
    return (
        f"On {rows} questions the model trained here gives the hosted model's very answer {show(exact, 'percent')} of "
        f"the time; its answers overlap with the other's by {show(chrf, 'points')} of 100 points (chrF)."
    )


def _numbers(result: Result) -> list[dict[str, str]]:
    agreement, speed = pick(result, "agreement"), pick(result, "speed")
    key, name = ("label", "Same label") if pick(agreement, "label") else ("exact", "Same answer")
    low, high = listed(pick(agreement, key, "interval"))
    theirs = show(pick(speed, "hosted_seconds"), "rate")
    return [
        {
            "name": name,
            "value": show(pick(agreement, key, "share"), "percent"),
            "note": f"95% interval {low:.1%} to {high:.1%}",
        },
        {
            "name": "chrF between them",
            "value": show(pick(agreement, "chrf"), "points"),
            "note": "overlap of the local answers with the hosted ones, 0 to 100",
        },
        {
            "name": "Seconds for one answer, here",
            "value": show(pick(speed, "local_seconds"), "rate"),
            "note": "the other's are not known" if theirs == NOTHING else f"{theirs} there, the network included",
        },
    ]


def metric_lines(result: Result) -> list[tuple[str, str, str, str]]:
    """(metric, hosted, local, what it is) of every score that either side has, by the references."""
    known = [(m.key, m.name, m.form, m.meaning) for m in METRICS]
    return [
        (name, show(hosted, form), show(local, form), meaning)
        for key, name, form, meaning in (_EXACT, *known)
        for hosted, local in [(pick(result, "hosted", key), pick(result, "local", key))]
        if as_number(hosted) is not None or as_number(local) is not None
    ]


def _intervals(result: Result) -> list[str]:
    key = "accuracy" if pick(result, "hosted", "accuracy") is not None else "exact"
    rows = []
    for side, color in (("hosted", 3), ("local", 1)):
        value, interval = as_number(pick(result, side, key)), listed(pick(result, side, f"{key}_interval"))
        if value is not None and len(interval) == 2:
            rows.append(Interval(side, value, *interval, color=color))
    if not rows:
        return []
    low = max(0.0, math.floor(min(row.low for row in rows) * 10) / 10)
    high = min(1.0, math.ceil(max(row.high for row in rows) * 10) / 10)
    title = f"{'Accuracy' if key == 'accuracy' else 'Answers like the reference'}, with 95% intervals"
    return [
        interval_chart(rows, title=title, low=low, high=high, width=width, kind=kind)
        for width, kind in ((960, "chart wide"), (380, "chart narrow"))
    ]


def _between(result: Result) -> dict[str, Any]:
    labels = [str(label) for label in listed(pick(result, "between", "labels"))]
    counts = listed(pick(result, "between", "counts"))
    return {
        "labels": labels,
        "rows": [
            (label, [(f"{cell:,.0f}", cell / (sum(line) or 1)) for cell in line])
            for label, line in zip(labels, counts, strict=False)
        ],
    }


def _samples(result: Result) -> list[dict[str, Any]]:
    return [
        {
            **{key: str(pick(sample, key) or "") for key in ("where", "prompt", "reference", "hosted", "local")},
            "agree": bool(pick(sample, "agree")),
            "long": len(str(pick(sample, "prompt") or "")) > LONG_PROMPT,
        }
        for sample in listed(pick(result, "samples"))
    ]


def _facts(result: Result) -> list[tuple[str, list[tuple[str, str]]]]:
    there, here, speed = pick(result, "from"), pick(result, "to"), pick(result, "speed")
    groups = [
        (
            "There",
            [
                ("Server", show(pick(there, "address"), "words")),
                ("Job", show(pick(there, "id"), "words")),
                ("Base", show(pick(there, "model"), "words")),
                ("Tuned model", show(pick(there, "fine_tuned_model"), "words")),
                ("Trained", _day(pick(there, "finished_at"))),
                ("Tokens trained", show(pick(there, "trained_tokens"), "count")),
                ("Size", "not published"),
                ("Seconds an answer", show(pick(speed, "hosted_seconds"), "rate")),
                *((str(key), str(value)) for key, value in items(pick(there, "metadata"))),
            ],
        ),
        (
            "Here",
            [
                ("Base", show(pick(here, "model"), "words")),
                ("Parameters", show(pick(here, "parameters"), "count")),
                ("Adapter parameters", show(pick(here, "trainable_parameters"), "count")),
                ("Adapter file", show(pick(here, "adapter_bytes"), "bytes")),
                ("Dtype", show(pick(here, "dtype"), "words")),
                ("Training", show(pick(here, "train_seconds"), "seconds")),
                ("Memory at the peak", show(pick(here, "peak_bytes"), "bytes")),
                ("Seconds an answer", show(pick(speed, "local_seconds"), "rate")),
                ("Tokens a second, many answers at a time", show(pick(speed, "local_tokens_per_second"), "points")),
            ],
        ),
    ]
    return [(title, [(name, value) for name, value in rows if value != NOTHING]) for title, rows in groups]


def _day(seconds: Any) -> str:
    number = as_number(seconds)
    return NOTHING if number is None else datetime.datetime.fromtimestamp(number, datetime.UTC).date().isoformat()
