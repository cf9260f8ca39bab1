"""Labels in the columns of a row, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal

from tunery.data.row_report import Report, describe, report_missing
from tunery.data.source import known_here, printable
from tunery.jsonl import JsonMapping, is_list

MOST_HINTS = 200


def label_text(value: object) -> str | None:
    """A label as text: 1 and 1.0 are "1", true is "true"; None for what cannot be a label (null, a list)."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and not math.isfinite(value):  # NaN is how pandas writes a missing value
        return None
    return str(value).strip() if isinstance(value, str | int | float | Decimal) else None


def same_label(text: str) -> str:
    """One form for the ways in which programs write one label in a CSV: "1.0" is "1", "True" is "true"."""
    if re.fullmatch(r"[+-]?\d+\.0+", text):
        return text.partition(".")[0]
    return text.lower() if text in ("True", "TRUE", "False", "FALSE") else text


class LabelMap(dict[str, str]):
    """Value in the file → label name.

    Attributes:
        hints: given so far. A file whose labels are all unknown would take minutes if each were compared with all.
    """

    hints = 0

    def hint(self, label: str) -> str:
        """What an unknown label may have meant, and which are known."""
        self.hints += 1
        return known_here(label, self, meant=self.hints <= MOST_HINTS)


def label_map(labels: Mapping[str, str] | tuple[str, ...]) -> LabelMap:
    """The map of a task, with "1" for a value given as 1.0; two values may share a name."""
    pairs = labels.items() if isinstance(labels, Mapping) else [(name, name) for name in labels]
    exact = {value.strip(): name for value, name in pairs}
    return LabelMap({same_label(value): name for value, name in exact.items()} | exact)


def read_label(report: Report, row: JsonMapping, key: str, labels: Mapping[str, str] | None) -> str:
    """The label under a key; "" where there is a problem.

    Args:
        labels: value in the file → label name, from `label_map`; None takes the values as they are.
    """
    if key not in row:
        report_missing(report, row, key)
        return ""
    label = label_text(row[key])
    if label is None:
        several = "a row has one label: give it one, or write the labels as the completion of a prompt"
        fix = several if is_list(row[key]) else "give the row a label, or remove it"
        report.add(key, f"a label is a text or a number, not {describe(row[key])}", fix)
        return ""
    if not label:
        report.add(key, "empty", "give the row a label, or remove it")
        return ""
    if labels is None:
        return label
    name = labels.get(label, labels.get(same_label(label)))
    if name is None:
        hint = labels.hint(label) if isinstance(labels, LabelMap) else known_here(label, labels)
        report.add(key, f"{printable(label)!r} is not one of the labels", f"{hint}; or add it to data.labels")
        return ""
    return name
