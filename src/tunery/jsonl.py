"""JSON objects, and files of JSON lines (jsonlines.org) that grow while a program runs and survive its end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from tunery.paths import disk_errors

JsonObject = dict[str, Any]
"""A JSON object whose members others choose: a row of a user's file, a request, a model's configuration. What tunery
itself promises has a class instead (tunery.records)."""

JsonMapping = Mapping[str, Any]
"""A JsonObject that is only read."""


def is_object(value: object) -> TypeGuard[JsonObject]:
    """Whether a value that others chose is a JSON object."""
    return isinstance(value, dict)


def is_mapping(value: object) -> TypeGuard[JsonMapping]:
    """Whether a value that others chose has members, whatever its class."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a value that others chose is a list."""
    return isinstance(value, list)


def parse_object(text: str | bytes) -> JsonObject | None:
    """The JSON object in a text (bytes are UTF-8); None if it is not one."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def encode_line(value: JsonMapping) -> str:
    """An object as one line, with its newline.

    Raises:
        ValueError: a number is not finite (JSON has none of these).
    """
    return json.dumps(dict(value), ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[JsonObject]:
    """The objects in a file; none if it is not there. A line that a crash cut short is passed over."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [value for line in content.split(b"\n") if (value := parse_object(line)) is not None]


def append_lines(path: Path, values: Iterable[JsonMapping]) -> None:
    """Add objects at the end, each on a line of its own, and hand them to the disk.

    A line that a crash cut short before them stays a line of its own.
    """
    text = "".join(encode_line(value) for value in values)
    if not text:
        return
    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                text = f"\n{text}"
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


class Tail:
    """The lines of a growing file, each given once.

    Attributes:
        replaced: the last `read` found another file under the name, and gave its lines from the start.
    """

    def __init__(self, path: Path):
        self._path, self._at, self._inode = path, 0, -1
        self.replaced = False

    def read(self) -> list[JsonObject]:
        """The whole lines that have been added; those that are not a JSON object are passed over."""
        self.replaced = False
        try:
            with open(self._path, "rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self._inode or about.st_size < self._at:
                    self.replaced = self._inode >= 0
                    self._at, self._inode = 0, about.st_ino
                file.seek(self._at)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._at += len(whole)
        return [line for piece in whole.splitlines() if (line := parse_object(piece)) is not None]
