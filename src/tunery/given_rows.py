"""Rows given in Python: lists of objects, pandas' DataFrames and data sets of the `datasets` library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tunery.jsonl import JsonObject, encode_line, is_list, is_mapping
from tunery.paths import text_sha256, write_atomic

FOLDER = "rows"
"""Where rows are kept, in the folder of the runs."""

_ABSENT = ("NAType", "NaTType")
"""Classes of pandas for values that are not there."""


def is_rows(value: object) -> bool:
    """Whether a value holds rows, rather than naming files."""
    if is_list(value) or isinstance(value, tuple):
        listed = list(cast("list[object]", value))
        return bool(listed) and all(map(is_mapping, listed))
    return _is_frame(value) or _is_dataset(value)


def _is_frame(value: object) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "columns")


def _is_dataset(value: object) -> bool:
    return hasattr(value, "features") and hasattr(value, "column_names") and hasattr(value, "__iter__")


def rows_of(value: object) -> Iterable[object]:
    """The rows of a value, one by one. Anything else that can be gone through is taken as it is."""
    table: Any = value
    return table.to_dict("records") if _is_frame(value) else table


def plain_row(row: object) -> JsonObject:
    """A row as JSON has it: tables also hold dates, decimals, arrays and NaN."""
    return json.loads(json.dumps(_plain(row), ensure_ascii=False, default=str))


def _plain(value: object) -> object:
    if type(value).__name__ in _ABSENT:
        return None
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if is_mapping(value):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if is_list(value) or isinstance(value, tuple):
        return [_plain(inner) for inner in cast("list[object]", value)]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        array: Any = value
        return _plain(array.tolist())
    return value


def keep_rows(value: object, folder: Path) -> Path:
    """Write rows to a file that is named after what they say, so that a run can be resumed and evaluated later.

    Args:
        folder: of the runs; the file lies in its FOLDER.
    """
    text = "".join(encode_line(plain_row(row)) for row in rows_of(value))
    path = folder / FOLDER / f"rows-{text_sha256(text)[:12]}.jsonl"
    if not path.is_file():
        write_atomic(path, text)
    return path
