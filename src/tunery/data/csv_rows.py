"""Rows out of tables as text: a header, then records (RFC 4180), separated by commas, semicolons, tabs or bars."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from tunery.data.example import ROW, Problem
from tunery.data.source import Item, RawRow, Source, open_text, printable
from tunery.data.strict_json import undecodable
from tunery.errors import DataError
from tunery.text import plural, some_of

_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars (|)"}
_ONE = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_SAMPLE_CHARACTERS = 1 << 16
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
"""What Excel writes above the header, to say what separates the fields."""


class Dialect(NamedTuple):
    """How a table is written: what separates fields, lines before the header, and whether blanks follow separators."""

    delimiter: str
    lines_before: int = 0
    blanks: bool = False


def table_rows(path: Path, source: Source) -> Iterator[Item]:
    """The records of a table, each with the names of its header.

    Raises:
        DataError: there is no header that can be used, or an open quote swallows the rest.
    """
    csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 characters is shorter than some documents
    shown, header, odd = source.shown, list[str](), _Oddities()
    spread: list[tuple[int, int]] = []
    with open_text(path, source, newline="") as file:
        dialect = _dialect(file, source, tabs=source.extension == ".tsv")
        for _ in range(dialect.lines_before):
            file.readline()
        reader = csv.reader(file, delimiter=dialect.delimiter, strict=True, skipinitialspace=dialect.blanks)
        while True:
            line = reader.line_num + 1 + dialect.lines_before
            try:
                record = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                problem = _table_problem(shown, line, error)
                if not header:
                    raise DataError(str(problem)) from None
                yield [problem]
                continue
            if not any(map(str.strip, record)):
                odd.blank += header != [] and record != []
                continue
            if (lines := reader.line_num + 1 + dialect.lines_before - line) > 1 and header:
                spread.append((lines, line))
            if not header:
                header = _header(record, source, line)
            else:
                record = odd.without_tail(record, len(header))
                odd.words.update(word for word in record if word in _MISSING)
                yield _record(record, header, dialect.delimiter, source, line)
    odd.tell(source)
    if spread:
        most, line = max(spread, key=lambda place: (place[0], -place[1]))
        source.notes.append(
            f"{shown}: rows that go over several lines, because a text in quotes has line breaks: {len(spread):,}; "
            f"that of line {line:,} takes {most:,} lines."
        )


_MISSING = frozenset(("NaN", "nan", "NAN", "None", "NULL", "null", "<NA>", "#N/A", "N/A", "NaT"))
"""What programs write for what is not there."""


@dataclass
class _Oddities:
    """What is noticed of records, and told when all are read.

    Attributes:
        blank: records of which every field is blank.
        longer: records that had blank fields beyond those of the header.
        words: words for what is missing → fields that hold one.
    """

    blank: int = 0
    longer: int = 0
    words: Counter[str] = field(default_factory=Counter[str])

    def without_tail(self, record: list[str], width: int) -> list[str]:
        """A record without blank fields beyond those of the header."""
        if len(record) <= width or any(map(str.strip, record[width:])):
            return record
        self.longer += 1
        return record[:width]

    def tell(self, source: Source) -> None:
        """Add the notes."""
        if self.blank:
            source.notes.append(f"{source.shown}: rows without any text, left out: {self.blank:,}.")
        if self.longer:
            source.notes.append(
                f"{source.shown}: rows with blank fields beyond those of the header, left out: {self.longer:,}."
            )
        if self.words:
            counts = ", ".join(f"{word} ({count:,})" for word, count in self.words.most_common())
            source.notes.append(
                f"{source.shown}: fields with a word for what is missing, read as that word: {counts}. "
                "Leave such fields empty if nothing is meant."
            )


def _record(record: list[str], header: list[str], delimiter: str, source: Source, line: int) -> Item:
    if undecodable("".join(record)):
        return [Problem(source.shown, line, ROW, *source.broken_character)]
    if len(record) != len(header):
        return [_wrong_width(record, header, delimiter, source.shown, line)]
    if [name.strip().lstrip("\ufeff") for name in record] == header and len(header) > 1:
        return [Problem(source.shown, line, ROW, "this line repeats the header", "were files joined? Remove the line")]
    return RawRow(line, dict(zip(header, record, strict=True)))


def _dialect(file: TextIO, source: Source, tabs: bool) -> Dialect:
    """How the table is written, judged by its first records. The file is left at its start."""
    sample = file.read(_SAMPLE_CHARACTERS)
    file.seek(0)
    above = _SEPARATOR_LINE.match(sample.lstrip("\ufeff"))
    lines_before = 0
    if above:
        lines_before, sample = 1, sample[sample.find("\n") + 1 :]
        source.notes.append(f"{source.shown}: the first line names the separator.")
    usual = "\t" if tabs else ","
    delimiters = [above[1]] if above else sorted(_NAMES, key=lambda one: one != usual)
    if tabs and "\t" in sample.partition("\n")[0]:
        delimiters = [usual]
    delimiter = max(delimiters, key=lambda one: _fit(sample, one))  # of equals the first
    if delimiter != usual and not above:
        source.notes.append(f"{source.shown} is separated by {_NAMES[delimiter]}.")
    header = next(iter(_records(sample, delimiter, blanks=False)), list[str]())
    blanks = any(name.lstrip(" ").startswith('"') and name.startswith(" ") for name in header)
    if blanks:
        source.notes.append(f"{source.shown}: blanks between a separator and a text in quotes are left out.")
    return Dialect(delimiter, lines_before, blanks)


def _fit(sample: str, delimiter: str) -> tuple[bool, float]:
    """How well a separator fits: whether the header has several names, and the share of records that are as long."""
    records = list(_records(sample, delimiter, blanks=True))
    if not records or len(records[0]) < 2:
        return False, 0.0
    return True, sum(len(record) == len(records[0]) for record in records) / len(records)


def _records(sample: str, delimiter: str, blanks: bool) -> Iterator[list[str]]:
    """The first records, as far as they can be read."""
    reader = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, strict=True, skipinitialspace=blanks)
    try:
        yield from itertools.islice((record for record in reader if record), 20)
    except csv.Error as error:
        if "unexpected end" not in str(error):  # where the sample was cut off
            yield []


def _table_problem(shown: str, line: int, error: csv.Error) -> Problem:
    if "unexpected end" in str(error):  # the open quote has swallowed every later row: nothing is left to skip to
        where = f"{shown}:{line}:{ROW}: a quote opened in this row is never closed"
        raise DataError(where, 'close it, and write a quote inside a quoted field as ""') from None
    return Problem(shown, line, ROW, f"not valid CSV: {error}", 'write a quote inside a quoted field as ""')


def _header(record: list[str], source: Source, line: int) -> list[str]:
    if undecodable("".join(record)):
        message, fix = source.broken_character
        raise DataError(f"{source.shown}:{line}: {message}", fix)
    names = [name.strip() or f"(column {number})" for number, name in enumerate(record, 1)]
    counts = Counter(names)
    if len(counts) < len(names):
        twice = [printable(name) for name, count in counts.items() if count > 1]
        raise DataError(
            f"{source.shown}:{line}: the header names {some_of(sorted(twice), 10)} more than once",
            "give every column its own name",
        )
    return names


def _wrong_width(record: list[str], header: list[str], delimiter: str, shown: str, line: int) -> Problem:
    message = f"{plural(len(record), 'field')}, but the header names {len(header):,}"
    if len(record) > len(header):
        fix = f'put a field that contains a {_ONE.get(delimiter, "separator")} in "quotes"'
        return Problem(shown, line, ROW, message, fix)
    return Problem(shown, line, ROW, message, f"add the missing {', '.join(header[len(record) :][:5])}")
