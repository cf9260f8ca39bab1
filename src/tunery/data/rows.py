"""One raw row to one Example, or to every problem it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tunery.data.detect import Shape
from tunery.data.example import Example, Place, Problem
from tunery.data.row_report import Report, Tally
from tunery.data.source import MOST_CHARACTERS, RawRow, printable, too_many_characters


def check_row(
    file: str,
    row: RawRow,
    shape: Shape,
    labels: Mapping[str, str] | None = None,
    tally: Tally | None = None,
    ignored: Collection[str] = (),
) -> Example | list[Problem]:
    """Turn a raw row into an example.

    Args:
        file: how messages name the row's file.
        row: the raw row.
        shape: its kind and columns.
        labels: classification: value in the file → label name, from `label_map`; None takes the values as they are.
        tally: to which what was noticed in a good row is added, and which keys of messages were left aside in any.
        ignored: names that the user leaves aside (data.ignore_columns).

    Returns:
        The example, or all problems of the row, each with the path of its field (`messages[2].content`).
    """
    report = Report(file, row.line, ignored)
    for key, value in row.value.items() if not isinstance(row.value, str) else ():
        if isinstance(value, str) and len(value) > MOST_CHARACTERS:
            report.add(printable(key), *too_many_characters(len(value)))
            return report.problems
    where = Place(file, row.line)
    if isinstance(row.value, str):
        if not shape.rules.plain_text:
            report.add("(row)", f"plain text cannot be a row of kind {shape.kind}", "give a table or JSON lines")
            return report.problems
        return Example(shape.kind, where, text=row.value)
    fields = shape.rules.parse(report, row.value, shape.columns, labels)
    if tally is not None:
        tally.set_aside.update(report.set_aside)
    if report.problems:
        return report.problems
    if tally is not None:
        report.add_to(tally)
    return Example(shape.kind, where, **fields)
