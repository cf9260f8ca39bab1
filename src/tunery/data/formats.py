"""Files to raw rows, each with its line. What a row means is the business of `detect` and `rows`.

| written as | read as |
| --- | --- |
| .jsonl, .ndjson | one JSON object per line (RFC 8259; blank lines ignored), or a list of objects per line |
| .json | a list of objects, also as {"data": […]}; objects one after another; JSON lines |
| .csv, .tsv | a header, then records (RFC 4180), separated by commas, semicolons, tabs or bars |
| .txt, .md | passages: paragraphs (split at blank lines) joined until `PASSAGE_CHARACTERS` are reached |
| .parquet | its records |
| a folder | saved by `datasets.save_to_disk` |
| hub:OWNER/NAME, hub:OWNER/NAME:SPLIT | a data set of the Hugging Face hub, by the `datasets` library |

Text is UTF-8, with or without a byte order mark, or as data.encoding says. A text file may be compressed by gzip, with
.gz after its name. Where there are no lines (the last three), the row number, from 1, stands for the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tunery.data.arrow import open_folder, open_hub, parquet_rows
from tunery.data.csv_rows import table_rows
from tunery.data.example import ROW, Problem
from tunery.data.json_rows import json_lines, json_values
from tunery.data.kinds.columns import COMPLETION_COLUMNS, FEEDBACK_COLUMNS, PROMPT_COLUMNS, TEXT_COLUMNS
from tunery.data.source import (
    BROKEN_GZIP,
    COMPRESSED,
    EXTENSIONS,
    Item,
    RawRow,
    Source,
    not_gzip,
    open_text,
    printable,
    require_file,
    shown_path,
)
from tunery.data.strict_json import StrictDecoder, after_space, undecodable
from tunery.errors import ConfigError, DataError
from tunery.jsonl import parse_object
from tunery.paths import file_sha256

PASSAGE_CHARACTERS = 4000
"""About 1,000 tokens: short enough that a book gives rows to hold out, long enough to fill a training window."""


def open_source(source: str, split: str = "train", encoding: str = "utf-8") -> Source:
    """Open a file, a `datasets` folder or a hub data set.

    Args:
        source: a path, or "hub:OWNER/NAME" with ":SPLIT" if wanted.
        split: the split taken from a data set that has several, unless `source` names one.
        encoding: of text files, as Python names it (data.encoding).

    Raises:
        ConfigError: no such file (similar names are suggested), a kind of file that is not read, a missing library, or
            a hub that cannot be reached.
        DataError: raised while `items` is read, when the rest of a file makes no sense, or when the file changes.
    """
    if source.startswith("hub:"):
        return open_hub(source, split)
    if "://" in source:
        raise ConfigError(
            f"{printable(source, 200)} is an address, and addresses are not read", "download the file first"
        )
    path = Path(source).expanduser()
    result = Source(shown_path(path), encoding=encoding)
    if require_file(path, result.shown):
        return open_folder(path, split, result)
    extension = result.extension = _extension(path)
    if extension not in EXTENSIONS:
        raise ConfigError(
            f"{result.shown}: files ending in {extension or '(nothing)'} are not read",
            f"give one of {', '.join(EXTENSIONS)}, a folder saved by `datasets`, or hub:OWNER/NAME",
        )
    try:
        before = _stamp(path)
        result.hashes[result.shown] = file_sha256(path)
    except OSError as error:
        raise ConfigError(f"{result.shown} cannot be read: {error.strerror}", "check the file's permissions") from None
    result.items = _as_hashed(_READERS[extension](path, result), path, before, result.shown)
    return result


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [COMPRESSED] and suffixes[0] != ".parquet":
        return suffixes[0] if len(suffixes) == 2 else COMPRESSED
    return suffixes[-1] if suffixes else ""


def _stamp(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _as_hashed(items: Iterator[Item], path: Path, before: tuple[int, int, int], shown: str) -> Iterator[Item]:
    """The items of a file, which must stay as it was when its hash was taken."""
    try:
        yield from items
        unchanged = _stamp(path) == before
    except BROKEN_GZIP as error:
        raise not_gzip(shown, error) from None
    except UnicodeError as error:  # of encodings whose characters are several bytes
        raise DataError(f"{shown}: the text is not {error.args[0]}", "is data.encoding that of the file?") from None
    except OSError as error:
        raise DataError(f"{shown} cannot be read any further: {error.strerror}", "is the file still there?") from None
    if not unchanged:
        raise DataError(f"{shown} changed while it was read", "let the program that writes it finish first")


def _passages(path: Path, source: Source) -> Iterator[Item]:
    with open_text(path, source, newline="") as file:
        text = file.read().replace("\r\n", "\n").replace("\r", "\n")
    _refuse_json(text, source.shown)
    _refuse_table(text, source.shown)
    begin, line, counted, passages = 0, 1, 0, 0
    breaks = [match.end() for match in re.finditer(r"\n(?:[ \t]*\n)+", text)]
    for end in [*breaks, len(text)]:
        if end - begin < PASSAGE_CHARACTERS and end < len(text):
            continue
        passage = text[begin:end].strip("\n")
        if passage.strip():
            first = begin + len(text[begin:end]) - len(text[begin:end].lstrip("\n"))
            line, counted, passages = line + text.count("\n", counted, first), first, passages + 1
            broken = undecodable(passage)
            yield [Problem(source.shown, line, ROW, *source.broken_character)] if broken else RawRow(line, passage)
        begin = end
    source.notes.append(f"{source.shown} is plain text, cut at blank lines into {passages} passages.")


def _refuse_json(text: str, shown: str) -> None:
    """Rows of JSON under the name of a plain text would be learned with their braces and keys."""
    lines = [line for line in text[:10_000].splitlines() if line.strip()][:5]
    if lines and parse_object(lines[0]) and (len(lines) == 1 or parse_object(lines[1])):
        raise DataError(f"{shown} holds JSON lines, not plain text", "name it .jsonl")
    start = after_space(text, 0)
    first = after_space(text, start + 1) if text.startswith("[", start) else start
    if text.startswith("{", first) and text.rstrip().endswith(("}", "]")):
        try:
            StrictDecoder().decode(text, first)
        except ValueError:
            return
        raise DataError(f"{shown} holds JSON, not plain text", "name it .json")


_HEADERS = {*TEXT_COLUMNS, *PROMPT_COLUMNS, *COMPLETION_COLUMNS, *FEEDBACK_COLUMNS}


def _refuse_table(text: str, shown: str) -> None:
    """So would a table be learned with its header and separators."""
    header, _, rest = text.lstrip("\ufeff\n").partition("\n")
    for separator, extension in ((",", ".csv"), (";", ".csv"), ("\t", ".tsv"), ("|", ".csv")):
        names = [name.strip().strip('"').casefold() for name in header.split(separator)]
        if len(names) > 1 and len(_HEADERS.intersection(names)) > 1 and separator in rest.partition("\n")[0]:
            raise DataError(f"{shown} holds a table ({printable(header, 60)}), not plain text", f"name it {extension}")


_READERS = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_values,
    ".csv": table_rows,
    ".tsv": table_rows,
    ".txt": _passages,
    ".md": _passages,
    ".parquet": parquet_rows,
}
