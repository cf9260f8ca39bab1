"""What is found while one row is read: its problems, and what of it was converted."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from tunery.data.example import ROW, Problem
from tunery.data.strict_json import decode_text
from tunery.jsonl import JsonMapping, is_list, is_object
from tunery.text import did_you_mean

QUOTES = "put it in quotes"


@dataclass
class Tally:
    """What reading noticed, counted over rows.

    Attributes:
        converted: what was written in another form than OpenAI's → rows.
        set_aside: keys of messages that the user leaves aside → rows.
        shortened: conversations whose end, after the last trained answer, was left out.
    """

    converted: Counter[str] = field(default_factory=Counter[str])
    set_aside: Counter[str] = field(default_factory=Counter[str])
    shortened: int = 0


class Report:
    """Collects the problems of one row, and what was converted in it.

    Attributes:
        ignored: names that the user leaves aside, in messages as among columns (data.ignore_columns).
        set_aside: those of them that were keys of messages.
        converted: the forms in which it was written, where these are not OpenAI's.
        shortened: the end of its conversation was left out.
    """

    def __init__(self, file: str, line: int, ignored: Collection[str] = ()):
        self.file, self.line = file, line
        self.ignored, self.set_aside = frozenset(ignored), set[str]()
        self.problems: list[Problem] = []
        self.converted: set[str] = set()
        self.shortened = False

    def add(self, field: str, message: str, fix: str) -> None:
        """Note a problem with the field at this path of the row."""
        self.problems.append(Problem(self.file, self.line, field, message, fix))

    def add_to(self, tally: Tally) -> None:
        """Count a row that is good."""
        tally.converted.update(self.converted)
        tally.shortened += self.shortened


def describe(value: object) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN, which stands for a missing number" if math.isnan(value) else "an infinite number"
    names: tuple[tuple[type | UnionType, str], ...] = (
        (int | float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
        (bytes, "bytes"),
    )
    return next((name for type_, name in names if isinstance(value, type_)), f"a {type(value).__name__}")


def says_nothing(value: object) -> bool:
    """Whether a value is null, blank or empty: how programs write what is not there."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def report_missing(report: Report, row: JsonMapping, key: str, at: str = "") -> None:
    """Note that `row` (found at the path `at`) lacks a key, and which one may have been meant."""
    if key in row:
        report.add(f"{at}{key}", "missing (it is null)", f"give {key} a value, or remove the row")
        return
    report.add(f"{at}{key}", "missing", did_you_mean(key, row) or f"add {key} to the row")


def read_text(report: Report, row: JsonMapping, key: str, may_be_blank: bool = False) -> str:
    """The text under a key; "" where there is a problem."""
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
        report.add(key, f"a text is needed, not {describe(value)}", fix)
    return ""


def read_json(report: Report, field: str, text: str, fix: str) -> object:
    """The value of a text of JSON; None where there is a problem.

    Args:
        fix: what to do about a text that is not JSON.
    """
    try:
        value, faults = decode_text(text)
    except ValueError as error:
        report.add(field, f"the text is not valid JSON ({error})", fix)
        return None
    for key, message, how in faults:
        report.add(field if key == ROW else f"{field}.{key}", message, how)
    return None if faults else value


_WRITTEN = re.compile(r"""\s*(?:\[\s*)?\{\s*(['"])(?:role|from|content|value|parts|messages)\1\s*:""")
_ROLE = re.compile(r"""['"](?:role|from)['"]\s*:\s*['"](?:system|developer|user|assistant|tool|human|gpt|model)['"]""")
_CONTENT = re.compile(r"""['"](?:content|value|parts|tool_calls)['"]\s*:""")
LISTS_AS_TEXT = "lists of messages as text"
PYTHON_LISTS = "lists as Python writes them"


def is_written(value: object) -> bool:
    """Whether a value is messages as text, as tables hold them: a list, one of them, or an object around a list."""
    return isinstance(value, str) and all((_WRITTEN.match(value), _ROLE.search(value), _CONTENT.search(value)))


def read_written(report: Report, field: str, text: str, fix: str) -> object:
    """The value of a text of JSON, or of Python's writing of lists; None where there is a problem."""
    before = len(report.problems)
    value = read_json(report, field, text, fix)
    if len(report.problems) > before and (shown := python_list(text)) is not None:
        del report.problems[before:]
        report.converted.add(PYTHON_LISTS)
        return shown
    return value


def read_list(report: Report, field: str, value: object, fix: str) -> list[Any] | None:
    """A list, which a table may hold as JSON text, or as Python shows it; None where there is a problem."""
    if isinstance(value, str):
        before = len(report.problems)
        value = read_written(report, field, value, fix)
        if len(report.problems) > before:
            return None
    if is_list(value):
        return value
    report.add(field, f"a list is needed, not {describe(value)}", fix)
    return None


def listed(text: str) -> object:
    """The list that a text is in JSON or in Python's writing; the text itself where it is none."""
    try:
        value, faults = decode_text(text)
    except ValueError:
        value, faults = python_list(text), []
    return value if is_list(value) and not faults else text


def python_list(text: str) -> list[Any] | None:
    """The list in a text that is not JSON but has Python's quotes, None, True and False, as pandas writes lists into a
    CSV, without the keys that are None, which tables invent; None for any other text."""
    if not text.lstrip().startswith("[") or "'" not in text:
        return None
    value = without_nulls(python_value(text))
    return value if is_list(value) else None


def without_nulls(value: Any) -> Any:
    """A value without the members that are null: Arrow gives every object of a column the same ones."""
    if is_object(value):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if is_list(value) else value


_LONGEST_PYTHON = 200_000
"""Characters: a syntax tree takes hundreds of times as many bytes."""


def python_value(text: str) -> object:
    """The value that a text is in Python's own writing; None where it is none, or holds what JSON cannot."""
    if len(text) > _LONGEST_PYTHON:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes
            tree = ast.parse(text.strip(), mode="eval")
        value = ast.literal_eval(tree)
        written = json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    pairs = sum(len(node.keys) for node in ast.walk(tree) if isinstance(node, ast.Dict))
    read, faults = decode_text(written)
    return read if not faults and pairs == _pairs(read) else None  # a key that stands twice is lost in the value


def _pairs(value: object) -> int:
    """How many keys the objects in a value have, together."""
    if is_list(value):
        return sum(map(_pairs, value))
    return sum(1 + _pairs(part) for part in value.values()) if is_object(value) else 0
