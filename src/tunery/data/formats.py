"""Files to raw rows, each with its line. What a row means is the business of `detect` and `validate`.

| written as | read as |
| --- | --- |
| .jsonl, .ndjson | one JSON object per line (RFC 8259; blank lines ignored) |
| .json | a list of objects; JSON lines under this name are read too |
| .csv, .tsv | a header, then records (RFC 4180); a semicolon-separated .csv is recognised |
| .txt, .md | passages: paragraphs (split at blank lines) joined until `PASSAGE_CHARACTERS` are reached |
| .parquet | its records |
| a folder | saved by `datasets.save_to_disk` |
| hub:OWNER/NAME, hub:OWNER/NAME:SPLIT | a data set of the Hugging Face hub, by the `datasets` library |

All text is UTF-8, with or without a byte order mark. Where there are no lines (the last three), the row number, from
1, stands for the line.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tunery.data.arrow import open_folder, open_hub, parquet_rows
from tunery.data.example import Problem
from tunery.data.source import (
    EXTENSIONS,
    NOT_UTF8,
    ROW,
    Item,
    RawRow,
    Source,
    open_text,
    printable,
    require_file,
    shown_path,
    undecodable,
)
from tunery.errors import ConfigError, DataError
from tunery.jsonl import JsonObject, is_object
from tunery.paths import file_sha256
from tunery.text import plural

PASSAGE_CHARACTERS = 4000
"""About 1,000 tokens: short enough that a book gives rows to hold out, long enough to fill a training window."""


def open_source(source: str, split: str = "train") -> Source:
    """Open a file, a `datasets` folder or a hub data set.

    Args:
        source: a path, or "hub:OWNER/NAME" with ":SPLIT" if wanted.
        split: the split taken from a data set that has several, unless `source` names one.

    Raises:
        ConfigError: no such file (similar names are suggested), a kind of file that is not read, a missing library, or
            a hub that cannot be reached.
        DataError: raised while `items` is read, when the rest of a file makes no sense.
    """
    if source.startswith("hub:"):
        return open_hub(source, split)
    if "://" in source:
        raise ConfigError(
            f"{printable(source, 200)} is an address, and addresses are not read", "download the file first"
        )
    path = Path(source).expanduser()
    result = Source(shown_path(path))
    if require_file(path, result.shown):
        return open_folder(path, split, result)
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise ConfigError(
            f"{result.shown}: files ending in {extension or '(nothing)'} are not read",
            f"give one of {', '.join(EXTENSIONS)}, a folder saved by `datasets`, or hub:OWNER/NAME",
        )
    try:
        result.hashes[result.shown] = file_sha256(path)
    except OSError as error:
        raise ConfigError(f"{result.shown} cannot be read: {error.strerror}", "check the file's permissions") from None
    result.items = _READERS[extension](path, result)
    return result


# --------------------------------------------------------------------------- JSON


class _Json:
    """A JSON decoder that reports what the standard one lets pass: repeated keys, NaN, halves of surrogate pairs."""

    def __init__(self) -> None:
        self._faults: list[tuple[str, str, str]] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def _object(self, pairs: list[tuple[str, object]]) -> JsonObject:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = sorted(key for key, count in counts.items() if count > 1)
            self._faults += [(key, "this key stands twice in one object", "keep one of them") for key in twice]
        return value

    def _float(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self._faults.append((ROW, f"the number {digits[:40]} is too large", "write a smaller one, or a text"))
        return number

    def _constant(self, name: str) -> None:
        self._faults.append((ROW, f"{name} is not JSON", "write null, or a number"))

    def decode(self, text: str, at: int = 0) -> tuple[object, int]:
        """The value that starts at `at`, and where it ends. Raises ValueError, a json.JSONDecodeError if it can."""
        self._faults.clear()
        try:
            return self._decoder.raw_decode(text, at)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def item(self, value: object, text: str, shown: str, line: int) -> Item:
        """The row, or its problems, of a value just decoded from `text`."""
        faults = list(self._faults)
        if undecodable(text):
            faults.append((ROW, *NOT_UTF8))
        elif "\\ud" in text.lower() and not _encodable(value):
            faults.append((ROW, "half of a surrogate pair (\\ud8xx) stands alone", "write the character itself"))
        row = RawRow(line, value) if is_object(value) else None
        if row is None:
            example = '{"text": "…"}'
            faults.append((ROW, f"a row is an object, not {_json_type(value)}", f"write it like {example}"))
        return [Problem(shown, line, *fault) for fault in faults] if row is None or faults else row


def _encodable(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _json_type(value: object) -> str:
    names: dict[type[object], str] = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _json_fault(error: ValueError) -> tuple[str, str]:
    """(column, what JSON expects there)."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}", f"invalid JSON: {error.msg[0].lower()}{error.msg[1:]}"
    return ROW, f"invalid JSON: {error}"


def _json_fix(line: str) -> str:
    if line.count("'") > line.count('"'):
        return "JSON wants double quotes around keys and texts"
    return "write one whole JSON object on each line"


_SPACE = re.compile(r"[ \t\n\r]*")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _json_lines(path: Path, source: Source) -> Iterator[Item]:
    json_, begun = _Json(), False
    with open_text(path, source.shown, newline="\n") as file:
        for number, raw in enumerate(file, 1):
            text = raw.strip()
            if not text:
                continue
            if not begun and text in ("[", "{"):
                raise DataError(
                    f"{source.shown}:{number}: this is one JSON value over many lines, not one object per line",
                    "name the file .json if it is a list of objects, else write each object on one line",
                )
            begun = True
            start = len(raw) - len(raw.lstrip())
            try:
                value, end = json_.decode(raw, start)
                if raw[end:].strip():
                    raise json.JSONDecodeError("more text after the end of the object", raw, _after_space(raw, end))
            except ValueError as error:
                yield [Problem(source.shown, number, *_json_fault(error), _json_fix(text))]
                continue
            yield json_.item(value, raw, source.shown, number)


def _json_list(path: Path, source: Source) -> Iterator[Item]:
    with open_text(path, source.shown, newline="") as file:
        text = file.read()
    at = _after_space(text, 0)
    if text.startswith("{", at):
        yield from _json_lines_in_disguise(path, source, text, at)
        return
    if not text[at:]:
        return
    try:
        yield from _json_elements(text, at, source.shown)
    except json.JSONDecodeError as error:  # nobody can tell where the next row begins
        column, message = _json_fault(error)
        raise DataError(f"{source.shown}:{error.lineno}:{column}: {message}", "fix the file at that place") from None
    except ValueError as error:
        raise DataError(f"{source.shown}: invalid JSON: {error}", "fix the file") from None


def _json_lines_in_disguise(path: Path, source: Source, text: str, at: int) -> Iterator[Item]:
    try:
        _Json().decode(text[at:].partition("\n")[0])
    except ValueError:
        raise DataError(
            f"{source.shown}:1: the file holds one JSON object, not a list of rows",
            "write [ {…}, {…} ], an object a row",
        ) from None
    source.notes.append(f"{source.shown} holds one object per line, so it is read as JSON lines.")
    yield from _json_lines(path, source)


def _json_elements(text: str, at: int, shown: str) -> Iterator[Item]:
    """The elements of the JSON list that starts at `at`, one by one, so that each has its line."""
    if not text.startswith("[", at):
        raise json.JSONDecodeError("expecting '[', the start of a list of rows", text, at)
    json_, line, counted = _Json(), 1, 0
    at = _after_space(text, at + 1)
    ended = text.startswith("]", at)
    while not ended:
        line, counted = line + text.count("\n", counted, at), at
        value, end = json_.decode(text, at)
        yield json_.item(value, text[at:end], shown, line)
        at = _after_space(text, end)
        ended = text.startswith("]", at)
        if not ended:
            if not text.startswith(",", at):
                raise json.JSONDecodeError("expecting ',' or ']'", text, at)
            at = _after_space(text, at + 1)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("more text after the end of the list", text, _after_space(text, at + 1))


# --------------------------------------------------------------------------- tables and plain text


def _table(path: Path, source: Source) -> Iterator[Item]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 characters is shorter than some documents
    shown, header = source.shown, []
    with open_text(path, shown, newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(file, source)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = _table_problem(shown, line, error)
                if not header:
                    raise DataError(str(problem)) from None
                yield [problem]
                continue
            if not record:
                continue
            broken = undecodable("".join(record))
            if not header:
                if broken:
                    raise DataError(f"{shown}:{line}: {NOT_UTF8[0]}", NOT_UTF8[1])
                header = _header(record, shown, line)
            elif broken:
                yield [Problem(shown, line, ROW, *NOT_UTF8)]
            elif len(record) != len(header):
                yield [_wrong_width(record, header, delimiter, shown, line)]
            else:
                yield RawRow(line, dict(zip(header, record, strict=True)))


def _delimiter(file: TextIO, source: Source) -> str:
    header = file.readline()
    file.seek(0)
    for character, name in ((";", "semicolons"), ("\t", "tabs")):
        if character in header and "," not in header:
            source.notes.append(f"{source.shown} is separated by {name}.")
            return character
    return ","


def _table_problem(shown: str, line: int, error: csv.Error) -> Problem:
    if "unexpected end" in str(error):  # the open quote has swallowed every later row: nothing is left to skip to
        where = f"{shown}:{line}:{ROW}: a quote opened in this row is never closed"
        raise DataError(where, 'close it, and write a quote inside a quoted field as ""') from None
    return Problem(shown, line, ROW, f"not valid CSV: {error}", 'write a quote inside a quoted field as ""')


def _header(record: list[str], shown: str, line: int) -> list[str]:
    names = [name.strip() or f"(column {number})" for number, name in enumerate(record, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{shown}:{line}: the header names {', '.join(twice)} more than once", "give every column its own name"
        )
    return names


def _wrong_width(record: list[str], header: list[str], delimiter: str, shown: str, line: int) -> Problem:
    message = f"{plural(len(record), 'field')}, but the header names {len(header)}"
    if len(record) > len(header):
        name = {"\t": "tab", ";": "semicolon"}.get(delimiter, "comma")
        return Problem(shown, line, ROW, message, f'put a field that contains a {name} in "quotes"')
    return Problem(shown, line, ROW, message, f"add the missing {', '.join(header[len(record) :][:5])}")


def _passages(path: Path, source: Source) -> Iterator[Item]:
    with open_text(path, source.shown, newline="") as file:
        text = file.read().replace("\r\n", "\n").replace("\r", "\n")
    begin, line, counted, passages = 0, 1, 0, 0
    breaks = [match.end() for match in re.finditer(r"\n(?:[ \t]*\n)+", text)]
    for end in [*breaks, len(text)]:
        if end - begin < PASSAGE_CHARACTERS and end < len(text):
            continue
        passage = text[begin:end].strip("\n")
        if passage.strip():
            first = begin + len(text[begin:end]) - len(text[begin:end].lstrip("\n"))
            line, counted, passages = line + text.count("\n", counted, first), first, passages + 1
            yield [Problem(source.shown, line, ROW, *NOT_UTF8)] if undecodable(passage) else RawRow(line, passage)
        begin = end
    source.notes.append(f"{source.shown} is plain text, cut at blank lines into {passages} passages.")


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _passages,
    ".md": _passages,
    ".parquet": parquet_rows,
}
