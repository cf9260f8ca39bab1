"""`tunery init`: a folder with a commented task file and a few rows to replace."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path

from tunery.errors import ConfigError
from tunery.paths import write_atomic
from tunery.text import did_you_mean


def templates() -> dict[str, Traversable]:
    """Name → folder of every template shipped with the package."""
    found = importlib.resources.files("tunery").joinpath("templates").iterdir()
    return {folder.name: folder for folder in sorted(found, key=lambda folder: folder.name) if folder.is_dir()}


def create(template: str, folder: Path) -> list[Path]:
    """Write a template's files into a folder, which is made if need be.

    Args:
        template: a key of `templates()`.
        folder: where to write. It may hold other files, but none by the names of the template's.

    Returns:
        The files written.

    Raises:
        ConfigError: no such template, `folder` is a file, or a file is there already (then nothing is written).
    """
    known = templates()
    if template not in known:
        meant = did_you_mean(template, known, 0.4)
        there = f"there are: {', '.join(known)}"
        raise ConfigError(f"there is no template {template!r}", f"{meant} {there}" if meant else there)
    return write_new(folder, {file.name: file.read_bytes() for file in known[template].iterdir() if file.is_file()})


def write_new(folder: Path, files: Mapping[str, str | bytes]) -> list[Path]:
    """Write files into a folder, which is made if need be; none that is there is touched.

    Args:
        files: name → content.

    Returns:
        The files written.

    Raises:
        ConfigError: `folder` is a file, or a file is there already (then nothing is written).
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file", "name a folder, new or empty")
    contents = {folder / name: content for name, content in files.items()}
    if existing := sorted(path.name for path in contents if path.exists()):
        raise ConfigError(
            f"{folder} already holds {' and '.join(existing)}; nothing was written",
            "name another folder, or move these files away",
        )
    for path, content in contents.items():
        write_atomic(path, content)
    return sorted(contents)
