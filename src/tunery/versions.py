"""Versions of what is installed, as receipts and caches name them."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

UNKNOWN = "unknown"


def version_of(distribution: str) -> str:
    """The version of an installed distribution, or "unknown".

    Of tunery run from its sources and never installed, the version in its pyproject.toml: that it was not installed
    is no reason to lose a finished run.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return _source_version() if distribution == "tunery" else UNKNOWN


def _source_version(folder: Path = Path(__file__).parents[2]) -> str:
    """The version of the sources that lie in `folder`, if tunery's do."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return UNKNOWN
    return str(project.get("version", UNKNOWN)) if project.get("name") == "tunery" else UNKNOWN
