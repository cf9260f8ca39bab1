"""One raw row to one Example, or to every problem it has.

Conversations are read by tunery.data.conversation, pairs of answers by tunery.data.preference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tunery.data.conversation import QUOTES, Report, kind_of, read_conversation, report_missing
from tunery.data.detect import Shape, known_here
from tunery.data.example import Example, Place, Problem
from tunery.data.preference import read_pair
from tunery.data.source import Row, printable


def check_row(file: str, row: Row, shape: Shape, labels: Mapping[str, str] | None = None) -> Example | list[Problem]:
    """Turn a raw row into an example.

    Args:
        file: how messages name the row's file.
        row: the raw row.
        shape: its kind and columns.
        labels: classification: value in the file → label name, from `label_map`; None takes the values as they are.

    Returns:
        The example, or all problems of the row, each with the path of its field (`messages[2].content`).
    """
    report = Report(file, row.line)
    where = Place(file, row.line)
    if isinstance(row.value, str):
        if shape.kind != "text":
            report.add("(row)", f"plain text cannot be a row of kind {shape.kind}", "give a table or JSON lines")
            return report.problems
        return Example("text", where, text=row.value)
    fields = _build(report, row.value, shape, labels)
    return report.problems or Example(shape.kind, where, **fields)


def _build(report: Report, row: dict[str, Any], shape: Shape, labels: Mapping[str, str] | None) -> dict[str, Any]:
    columns = shape.columns
    if shape.kind == "chat":
        return read_conversation(report, row, columns)
    if shape.kind == "preference":
        key = columns.get("prompt")
        if key and isinstance(row.get(key), str):
            row = {**row, key: _with_input(report, row, columns, row[key])}
        return read_pair(report, row, columns)
    if shape.kind == "completion":
        prompt = _text(report, row, columns["prompt"], may_be_blank=True)
        return {
            "prompt": _with_input(report, row, columns, prompt),
            "completion": _text(report, row, columns["completion"]),
        }
    text = _text(report, row, columns.get("text", "text"))
    if shape.kind == "text":
        return {"text": text}
    return {"text": text, "label": _label(report, row, columns["label"], labels)}


# --------------------------------------------------------------------------- texts and labels


def _text(report: Report, row: dict[str, Any], key: str, may_be_blank: bool = False) -> str:
    value = row.get(key)
    if isinstance(value, str):
        if not may_be_blank and not value.strip():
            report.add(key, "empty", "write the text, or remove the row")
        return value
    if key not in row:
        report_missing(report, row, key)
    elif isinstance(value, list):
        report.add(key, "a text is needed, not a list", "put a conversation in one messages list (kind chat)")
    else:
        fix = QUOTES if isinstance(value, int | float) else "write the text, or remove the row"
        report.add(key, f"a text is needed, not {kind_of(value)}", fix)
    return ""


def _with_input(report: Report, row: dict[str, Any], columns: Mapping[str, str], prompt: str) -> str:
    """Alpaca's input goes under the instruction. A row may have one even if those that detection saw do not."""
    is_instruction = columns["prompt"].casefold() == "instruction"
    key = columns.get("input", "input" if is_instruction and "input" not in columns.values() else None)
    if key is None or row.get(key) is None:
        return prompt
    extra = _text(report, row, key, may_be_blank=True)
    return f"{prompt}\n\n{extra}" if extra.strip() else prompt


def label_text(value: Any) -> str | None:
    """A label as text: 1 and 1.0 are "1", true is "true"; None for what cannot be a label (null, a list)."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and math.isnan(value):  # how pandas writes a missing value
        return None
    return str(value).strip() if isinstance(value, str | int | float | Decimal) else None


def _same_label(text: str) -> str:
    """One form for the ways in which programs write one label in a CSV: "1.0" is "1", "True" is "true"."""
    if re.fullmatch(r"[+-]?\d+\.0+", text):
        return text.partition(".")[0]
    return text.lower() if text in ("True", "TRUE", "False", "FALSE") else text


def label_map(labels: Mapping[str, str] | tuple[str, ...]) -> dict[str, str]:
    """Value in the file → label name, with "1" for a value given as 1.0; two values may share a name."""
    pairs = labels.items() if isinstance(labels, Mapping) else [(name, name) for name in labels]
    exact = {value.strip(): name for value, name in pairs}
    return {_same_label(value): name for value, name in exact.items()} | exact


def _label(report: Report, row: dict[str, Any], key: str, labels: Mapping[str, str] | None) -> str:
    if key not in row:
        report_missing(report, row, key)
        return ""
    label = label_text(row[key])
    if label is None:
        report.add(key, f"a label is a text or a number, not {kind_of(row[key])}", "give the row a label, or remove it")
        return ""
    if not label:
        report.add(key, "empty", "give the row a label, or remove it")
        return ""
    if labels is None:
        return label
    name = labels.get(label, labels.get(_same_label(label)))
    if name is None:
        report.add(key, f"{printable(label)!r} is not one of the labels", known_here(label, labels))
        return ""
    return name
