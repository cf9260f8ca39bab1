"""Files of JSON lines that grow while a program runs, and survive its end at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunery.paths import disk_errors


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file; none if it is not there. A line that a crash cut short is passed over."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = []
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def append(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Add objects at the end, each on a line of its own, and hand them to the disk."""
    text = "".join(json.dumps(dict(value), ensure_ascii=False, allow_nan=False) + "\n" for value in values)
    if not text:
        return
    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                text = f"\n{text}"  # what a crash cut short stays a line of its own
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
