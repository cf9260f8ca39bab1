"""What all readers of rows share: the raw row, the source it comes from, and text that may hold wrong bytes."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from tunery.data.example import Problem
from tunery.errors import ConfigError, DataError
from tunery.jsonl import JsonObject
from tunery.text import did_you_mean, similar_names

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet")
COMPRESSED = ".gz"
"""Follows the extension of a text file that gzip compressed: rows.jsonl.gz."""
MOST_CHARACTERS = 20_000_000
"""Of a text in a row, and of a row of JSON: what takes about 10 seconds to tokenise."""


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
        encoding: of a text file (data.encoding).
        extension: of the file, in lower case, without COMPRESSED.
    """

    shown: str
    encoding: str = "utf-8"
    extension: str = ""
    items: Iterator[Item] = field(default_factory=lambda: iter(()))
    hashes: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])

    @property
    def broken_character(self) -> tuple[str, str]:
        """Message and fix of a row with bytes that are not of the encoding."""
        if self.encoding == "utf-8":
            fix = "save the file as UTF-8, or name its encoding in data.encoding (cp1252 is usual on Windows)"
            return "a character is not valid UTF-8", fix
        return f"a character is not valid {self.encoding}", "is data.encoding that of the file?"


def shown_path(path: Path) -> str:
    """A path as messages show it: relative to the current folder when that is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive, on Windows
        return str(path)
    return min(relative, str(path), key=len)


_OTHER_FORMATS = {
    b"PK\x03\x04": ("a zip file, as .xlsx files of Excel are", "save the table as CSV"),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", "save the table as CSV"),
    b"\x1f\x8b": ("compressed by gzip", "add .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it with unzstd"),
    b"%PDF": ("a PDF file", "save its text as .txt"),
    b"PAR1": ("a Parquet file", "name it .parquet"),
    b"SQLite format 3": ("an SQLite database", "write its rows to a .csv or .jsonl file"),
}
"""First bytes of files that are not text → what they are, and what to do."""

_PAGE = (b"<!doctype html", b"<html")
_GZIP = b"\x1f\x8b"
BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
_LFS = b"version https://git-lfs.github.com/spec/"


def require_file(path: Path, shown: str) -> bool:
    """Make sure that there is something to read; whether it is a folder.

    Raises:
        ConfigError: there is no such file (those that are like it are suggested), or it cannot be read.
        DataError: the file holds something else than its name says.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            os.listdir(path)
            return True
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{shown} is not a file that can be read twice", "write its rows to a file first")
        with open(path, "rb") as file:
            start = file.read(64)
        if start.startswith(_GZIP) and path.suffix.lower() == COMPRESSED:
            with gzip.open(path, "rb") as file:
                start = file.read(64)
    except (FileNotFoundError, NotADirectoryError):
        raise missing_file(path, shown) from None
    except BROKEN_GZIP as error:
        raise not_gzip(shown, error) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"{printable(shown, 120)} cannot be read: {why}", "check the path and its permissions"
        ) from None
    if start.startswith(_LFS):
        raise DataError(f"{shown} is a Git LFS pointer, not the data itself", "fetch the data with `git lfs pull`")
    if path.suffix.lower() != ".parquet":
        for first, (what, fix) in _OTHER_FORMATS.items():
            if start.startswith(first):
                raise DataError(f"{shown} is not text but {what}", fix)
    if start.lstrip().lower().startswith(_PAGE) and path.suffix.lower() not in (".txt", ".md"):
        raise DataError(f"{shown} holds a web page", "download the data itself, not the page that shows it")
    return False


def too_many_characters(count: int) -> tuple[str, str]:
    """Message and fix of a text that is too long to be a row."""
    return f"{count:,} characters are more than the {MOST_CHARACTERS:,} of the longest row", "cut it into several rows"


def missing_file(path: Path, shown: str) -> ConfigError:
    """The error for a file that does not exist, suggesting those that do."""
    if path.is_symlink():
        return ConfigError(
            f"{shown} is a link to {printable(os.readlink(path), 120)}, which does not exist", "fix the link"
        )
    shown = printable(shown, 200)
    if not path.parent.is_dir():
        folder = printable(shown_path(path.parent), 200)
        return ConfigError(f"no file {shown}: the folder {folder} does not exist", "check data.train")
    try:
        names = sorted(map(printable, os.listdir(path.parent)))
    except OSError as error:
        return ConfigError(f"no file {shown}: its folder cannot be read: {error.strerror}", "check its permissions")
    close = similar_names(printable(path.name, 200), names, 3, 0.5)
    readable = [name for name in names if name.lower().endswith(EXTENSIONS)][:8]
    if close:
        return ConfigError(f"no file {shown}", f"did you mean {' or '.join(close)}?")
    there = f"data files in that folder: {', '.join(readable)}" if readable else "that folder holds no data files"
    return ConfigError(f"no file {shown}", there)


def not_gzip(shown: str, error: Exception) -> DataError:
    """The error for a file whose compression breaks off or makes no sense."""
    return DataError(f"{shown} is not a whole gzip file: {error}", "compress it again, or copy it anew")


def open_text(path: Path, source: Source, newline: str) -> TextIO:
    """A text in which a byte that is not of the encoding does not stop the reading: `undecodable` finds it in its row.

    Raises:
        DataError: the file is UTF-16 or UTF-32, and `source.encoding` does not say so.
    """
    packed = path.suffix.lower() == COMPRESSED
    with gzip.open(path, "rb") if packed else open(path, "rb") as file:
        mark = file.read(4)
    encoding = "utf-8-sig" if source.encoding == "utf-8" else source.encoding
    for wide, marks in (("UTF-32", (b"\xff\xfe\0\0", b"\0\0\xfe\xff")), ("UTF-16", (b"\xff\xfe", b"\xfe\xff"))):
        if mark.startswith(marks) and not encoding.startswith(f"utf-{wide[-2:]}"):
            raise DataError(f"{source.shown}:1: the file is {wide}", f"save it as UTF-8, or set data.encoding: {wide}")
    if source.encoding == "utf-8" and len(mark) == 4 and mark[::2].strip(b"\0") != mark[1::2].strip(b"\0") == b"":
        fix = "save it as UTF-8, or set data.encoding: utf-16-le"
        raise DataError(f"{source.shown}:1: every other byte is 0, as in UTF-16", fix)
    try:
        if packed:
            return gzip.open(path, "rt", encoding=encoding, errors="surrogateescape", newline=newline)
        return open(path, encoding=encoding, errors="surrogateescape", newline=newline)
    except LookupError:  # Python calls zip and base64 encodings, too
        raise ConfigError(
            f"data.encoding: {encoding} is not an encoding of text", "utf-8 and cp1252 are usual"
        ) from None


def printable(text: str, limit: int = 40) -> str:
    """Text from a file as a message may show it: shortened, and with control and broken characters escaped."""
    text = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def known_here(name: str, known: Iterable[str], meant: bool = True) -> str:
    """A hint that names the closest of the known names (if `meant`), and all of them (shortened)."""
    known = list(known)
    more = f" and {len(known) - 30} more" if len(known) > 30 else ""
    close = did_you_mean(printable(name), map(printable, known)) if meant else None
    return (f"{close} " if close else "") + f"known here: {', '.join(map(printable, known[:30]))}{more}"
