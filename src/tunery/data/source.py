"""What all readers of rows share: the raw row, the source it comes from, and text that may hold wrong bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from tunery.data.example import Problem
from tunery.errors import ConfigError, DataError
from tunery.jsonl import JsonObject
from tunery.text import did_you_mean, plural, similar_names

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet")
PROBLEMS_SHOWN = 100
ROW = "(row)"
"""The field of a problem that concerns a whole row."""
NOT_UTF8 = ("a character is not valid UTF-8", "save the file as UTF-8")
"""Message and fix of a row with such a character."""

_BROKEN_BYTE = re.compile("[\udc80-\udcff]")  # where a byte that is not UTF-8 ends up under errors="surrogateescape"


class RawRow(NamedTuple):
    """One raw row: the line it starts on, from 1, and its fields (or its text, from a plain text file)."""

    line: int
    value: JsonObject | str


Item = RawRow | list[Problem]
"""A row, or all problems of one that could not be parsed."""


@dataclass
class Source:
    """An opened source of rows.

    Attributes:
        shown: how messages name it: a path relative to the current folder when that is shorter, or hub:OWNER/NAME.
        items: its rows in order, and in their places the problems of rows that could not be parsed. Can be read once.
        hashes: path → SHA-256 of each file behind it (a hub data set: its name → fingerprint).
        notes: what was decided while reading, a sentence each; grows until `items` is used up.
    """

    shown: str
    items: Iterator[Item] = field(default_factory=lambda: iter(()))
    hashes: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])


def shown_path(path: Path) -> str:
    """A path as messages show it: relative to the current folder when that is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive, on Windows
        return str(path)
    return min(relative, str(path), key=len)


def missing_file(path: Path, shown: str) -> ConfigError:
    """The error for a file that does not exist, suggesting those that do."""
    if not path.parent.is_dir():
        return ConfigError(f"no file {shown}: the folder {shown_path(path.parent)} does not exist", "check data.train")
    names = sorted(os.listdir(path.parent))
    close = similar_names(path.name, names, 3, 0.5)
    readable = [name for name in names if name.lower().endswith(EXTENSIONS)][:8]
    if close:
        return ConfigError(f"no file {shown}", f"did you mean {' or '.join(close)}?")
    there = f"data files in that folder: {', '.join(readable)}" if readable else "that folder holds no data files"
    return ConfigError(f"no file {shown}", there)


def bad_rows(problems: Sequence[Problem], rows: int, of: int, hint: str) -> DataError:
    """The error that lists the problems of some rows.

    Args:
        rows, of: so many of all rows have them.
    """
    lines = [f"{plural(len(problems), 'problem')} in {rows:,} of {of:,} rows:"]
    lines += [printable(str(problem), 500) for problem in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"… and {len(problems) - PROBLEMS_SHOWN:,} more")
    return DataError("\n".join(lines), hint)


def open_text(path: Path, shown: str, newline: str) -> TextIO:
    """UTF-8 text in which a wrong byte does not stop the reading: `undecodable` finds it in its row."""
    with open(path, "rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{shown}:1: the file is UTF-16", "save it as UTF-8")
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def undecodable(text: str) -> bool:
    """Whether a text read by `open_text` holds a byte that was not UTF-8."""
    return not text.isascii() and _BROKEN_BYTE.search(text) is not None


def printable(text: str, limit: int = 40) -> str:
    """Text from a file as a message may show it: shortened, and with control and broken characters escaped."""
    text = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def known_here(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of the known names, and all of them (shortened)."""
    known = list(map(printable, known))
    more = f" and {len(known) - 30} more" if len(known) > 30 else ""
    meant = did_you_mean(printable(name), known)
    return (f"{meant} " if meant else "") + f"known here: {', '.join(known[:30])}{more}"
