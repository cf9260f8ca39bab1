"""Rows out of JSON: an object a line, a list of objects, objects one after another, or a list inside an object."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tunery.data.example import ROW, Fault, Problem
from tunery.data.row_report import describe
from tunery.data.source import MOST_CHARACTERS, Item, RawRow, Source, open_text, printable, too_many_characters
from tunery.data.strict_json import StrictDecoder, after_space, json_fault, undecodable
from tunery.errors import DataError
from tunery.jsonl import JsonObject, is_list, is_object

_MARK = "\ufeff"
"""A byte order mark, which stands inside a file when several were joined."""

WRAPPERS = ("data", "rows", "examples", "records", "items", "instances", "train", "training", "dataset", "results")
"""Keys under which an object may hold the list of all rows."""


_COMMAS = "lines that end with a comma"
_CONVERSATIONS = "lines with a list of messages, each read as a conversation"
_LISTS = "lines with a list of rows, each read as rows"
_MARKS = "byte order marks inside the file, left out"


def json_lines(path: Path, source: Source) -> Iterator[Item]:
    """The rows of a file with one JSON value per line: an object, or a list of objects."""
    decoder, begun, noticed = StrictDecoder(), False, Counter[str]()
    with open_text(path, source, newline="\n") as file:
        for number, raw in enumerate(file, 1):
            text = raw.strip()
            if text.startswith(_MARK):
                noticed[_MARKS] += 1
                text = text.lstrip(_MARK).lstrip()
                raw = " " * (len(raw) - len(raw.lstrip(_MARK))) + raw.lstrip(_MARK)
            if not text:
                continue
            if len(raw) > MOST_CHARACTERS:
                yield [Problem(source.shown, number, ROW, *too_many_characters(len(raw)))]
                continue
            try:
                value, end = decoder.decode(raw, len(raw) - len(raw.lstrip()))
                if (rest := raw[end:].strip()) == ",":
                    noticed[_COMMAS] += 1
                elif rest:
                    raise json.JSONDecodeError("more text after the end of the object", raw, after_space(raw, end))
            except ValueError as error:
                if not begun and _goes_on(error, raw):
                    source.notes.append(f"{source.shown} is read as JSON over many lines, not as one object per line.")
                    yield from json_values(path, source)
                    return
                begun = True
                yield [Problem(source.shown, number, *json_fault(error), _json_fix(text, error))]
                continue
            begun = True
            if is_list(value) and value and all(map(is_object, value)) and not _is_conversation(value):
                noticed[_LISTS] += 1
                yield from _listed(value, decoder.faults, raw, source, number)
            else:
                noticed[_CONVERSATIONS] += _is_conversation(value)
                yield _item(value, decoder.faults, raw, source, number)
    source.notes += [f"{source.shown}: {what}: {count:,}." for what, count in noticed.items() if count]


def _goes_on(error: ValueError, line: str) -> bool:
    """Whether the JSON of the first line only breaks off at its end, so that it goes on in the next one."""
    in_text = ("Invalid control", "Unterminated")
    return (
        isinstance(error, json.JSONDecodeError) and not error.msg.startswith(in_text) and not line[error.pos :].strip()
    )


def _is_conversation(value: object) -> bool:
    """Whether a value is a list of messages."""
    marks = (("role", "content"), ("from", "value"))
    return is_list(value) and any(
        all(is_object(message) and message.keys() >= {*keys} for message in value) for keys in marks if value
    )


def _listed(rows: list[JsonObject], faults: list[Fault], text: str, source: Source, line: int) -> Iterator[Item]:
    """The rows of a list that stands on one line."""
    if faults:
        yield _item({}, faults, text, source, line)
        return
    for row in rows:
        yield _item(row, [], text, source, line)


def _item(value: object, faults: list[Fault], text: str, source: Source, line: int) -> Item:
    """The row, or its problems, of a value just decoded from `text`."""
    faults = list(faults)
    if _is_conversation(value):
        value = {"messages": value}
    if undecodable(text):
        faults.append((ROW, *source.broken_character))
    if is_object(value) and not faults:
        return RawRow(line, value)
    if not is_object(value):
        example = '{"text": "…"}'
        faults.append((ROW, f"a row is an object, not {describe(value)}", f"write it like {example}"))
    return [Problem(source.shown, line, *fault) for fault in faults]


def _json_fix(line: str, error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError) and error.msg.startswith("Invalid control"):
        return "write a line break or tab inside a text as \\n or \\t"
    if line.count("'") > line.count('"'):
        return "JSON wants double quotes around keys and texts"
    return "write one whole JSON object on each line"


def json_values(path: Path, source: Source) -> Iterator[Item]:
    """The rows of a file of JSON that may go over many lines."""
    with open_text(path, source, newline="") as file:
        text = file.read()
    at = after_space(text, 0)
    if not text[at:]:
        return
    try:
        if not text.startswith("{", at):
            yield from _elements(text, at, source)
        elif (start := _wrapped(text, at, source)) is not None:
            yield from _elements(text, start, source, ended=False)
        elif _is_lines(text, at):
            source.notes.append(f"{source.shown} holds one object per line, so it is read as JSON lines.")
            yield from json_lines(path, source)
        else:
            yield from _objects(text, at, source)
    except json.JSONDecodeError as error:  # nobody can tell where the next row begins
        column, message = json_fault(error)
        raise DataError(f"{source.shown}:{error.lineno}:{column}: {message}", "fix the file at that place") from None
    except ValueError as error:
        raise DataError(f"{source.shown}: invalid JSON: {error}", "fix the file") from None


def _is_lines(text: str, at: int) -> bool:
    """Whether the first line is a whole value, so that each line can be read by itself, whatever the others hold."""
    try:
        StrictDecoder().decode(text[at:].partition("\n")[0])
    except ValueError:
        return False
    return True


def _wrapped(text: str, at: int, source: Source) -> int | None:
    """Where the list of all rows starts in a file that is one object around it; None in another file."""
    decoder = StrictDecoder()
    try:
        value, end = decoder.decode(text, at)
    except ValueError:
        return None
    if not is_object(value) or text[after_space(text, end) :]:
        return None
    lists = [key for key, part in value.items() if is_list(part) and part and all(map(is_object, part))]
    if len(lists) == 1 and lists[0] in WRAPPERS:
        others = ", ".join(printable(key) for key in list(value)[:10] if key != lists[0])
        beside = f"; what stands beside it is not used: {others}" if others else ""
        source.notes.append(f"{source.shown}: the rows are those under {lists[0]}{beside}.")
        return _member(text, at, lists[0])
    rows = [key for key in lists if not any("role" in part or "from" in part or "type" in part for part in value[key])]
    if len(rows) > 1 and len(rows) == len(value):
        raise DataError(
            f"{source.shown} holds lists under {', '.join(map(printable, rows[:10]))}, not one list of rows",
            "write each list of rows to a file of its own",
        )
    parts = list(value.values())
    by_column = len({len(part) for part in parts if is_list(part) or is_object(part)}) == 1
    if by_column and all((is_list(p) or (is_object(p) and "0" in p)) and not _holds_objects(p) for p in parts):
        raise DataError(
            f"{source.shown} holds the table by columns ({', '.join(list(value)[:5])}), not by rows",
            'write an object a row: [{"text": …}, …]; pandas does with to_json(orient="records")',
        )
    return None


def _holds_objects(part: list[object] | JsonObject) -> bool:
    return any(is_object(value) or is_list(value) for value in (part if isinstance(part, list) else part.values()))


def _member(text: str, at: int, name: str) -> int:
    """Where the value of a member starts, in the object that starts at `at`."""
    decoder = StrictDecoder()
    at = after_space(text, at + 1)
    while True:
        key, end = decoder.decode(text, at)
        at = after_space(text, after_space(text, end) + 1)
        if key == name:
            return at
        _, end = decoder.decode(text, at)
        at = after_space(text, after_space(text, end) + 1)


class _Lines:
    """Counts the lines of a text up to places that only grow."""

    def __init__(self, text: str) -> None:
        self.text, self.line, self.counted = text, 1, 0

    def at(self, place: int) -> int:
        self.line, self.counted = self.line + self.text.count("\n", self.counted, place), place
        return self.line


def _objects(text: str, at: int, source: Source) -> Iterator[Item]:
    """Objects one after another, each over as many lines as it likes."""
    decoder, lines = StrictDecoder(), _Lines(text)
    while at < len(text):
        value, end = decoder.decode(text, at)
        yield _item(value, decoder.faults, text[at:end], source, lines.at(at))
        at = after_space(text, end)
        if text.startswith(",", at):
            at = after_space(text, at + 1)


def _elements(text: str, at: int, source: Source, ended: bool = True) -> Iterator[Item]:
    """The elements of the JSON list that starts at `at`, one by one, so that each has its line.

    Args:
        ended: nothing may follow the list.
    """
    if not text.startswith("[", at):
        raise json.JSONDecodeError("expecting '[', the start of a list of rows", text, at)
    decoder, lines = StrictDecoder(), _Lines(text)
    at = after_space(text, at + 1)
    done = text.startswith("]", at)
    while not done:
        value, end = decoder.decode(text, at)
        yield _item(value, decoder.faults, text[at:end], source, lines.at(at))
        at = after_space(text, end)
        done = text.startswith("]", at)
        if not done:
            if not text.startswith(",", at):
                raise json.JSONDecodeError("expecting ',' or ']'", text, at)
            comma, at = at, after_space(text, at + 1)
            if text.startswith("]", at):
                raise json.JSONDecodeError("a comma before the end of the list", text, comma)
    if ended and text[at + 1 :].strip():
        raise json.JSONDecodeError("more text after the end of the list", text, after_space(text, at + 1))
