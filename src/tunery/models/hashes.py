"""SHA-256 of large files, computed once: it is remembered while path, size and time stamp stay the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from tunery.errors import TuneryError
from tunery.paths import cache_dir, file_sha256, read_json, text_sha256, write_json


def cached_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; from the cache if the file has not changed since it was computed."""
    path = path.resolve()
    facts = path.stat()
    seen = {"path": str(path), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    note = cache_dir() / "hashes" / f"{text_sha256(str(path))[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        known = read_json(note)
        if isinstance(known, dict) and {key: known.get(key) for key in seen} == seen and known.get("sha256"):
            return str(known["sha256"])
    digest = file_sha256(path)
    with contextlib.suppress(OSError, TuneryError):  # a cache that cannot be written costs time, nothing else
        write_json(note, {**seen, "sha256": digest})
    return digest


def combined_sha256(paths: Iterable[Path]) -> str:
    """One hash of several files: of the lines "NAME SHA-256", sorted by name."""
    return text_sha256("".join(f"{path.name} {cached_sha256(path)}\n" for path in sorted(paths, key=lambda p: p.name)))
