"""Versions of what is installed, as receipts and caches name them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

UNKNOWN = "unknown"

_SOURCES = Path(__file__).parents[2]
"""The clone, if tunery runs from one."""


def version_of(distribution: str) -> str:
    """The version of an installed distribution, or "unknown".

    Of tunery run from its sources and never installed, the version in its pyproject.toml: that it was not installed
    is not a reason to lose a finished run.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return _source_version() if distribution == "tunery" else UNKNOWN


def _source_version(folder: Path = _SOURCES) -> str:
    """The version of the sources that lie in `folder`, if tunery's do."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return UNKNOWN
    return str(project.get("version", UNKNOWN)) if project.get("name") == "tunery" else UNKNOWN


_FOR_DEVELOPERS = ("dev",)


def optional_packages() -> dict[str, list[str]]:
    """Extra of pyproject.toml → its packages, of those that users may want."""
    try:
        wanted = importlib.metadata.requires("tunery") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = _source_requirements()
    found: dict[str, list[str]] = {}
    for requirement in wanted:
        named = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", requirement)
        if named and extra and extra[1] not in _FOR_DEVELOPERS:
            found.setdefault(extra[1], []).append(named[0])
    return dict(sorted(found.items()))


def _source_requirements(folder: Path = _SOURCES) -> list[str]:
    """Optional requirements of the sources in `folder`, as an installed package states them."""
    try:
        extras = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return []
    groups = extras.get("optional-dependencies", {})
    return [f'{package} ; extra == "{extra}"' for extra, packages in groups.items() for package in packages]


def install_command(extra: str) -> str:
    """How to install the packages of an extra of pyproject.toml, from where tunery itself was installed (PEP 610).

    Args:
        extra: "" for the packages that tunery always needs.
    """
    bracket = f"[{extra}]" if extra else ""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        origin = json.loads(importlib.metadata.distribution("tunery").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        origin = {"url": _SOURCES.as_uri(), "dir_info": {"editable": True}}
    except ValueError:
        origin = {}
    url = str(origin.get("url", ""))
    if "dir_info" in origin and url.startswith("file:"):
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {editable}'{url2pathname(urlsplit(url).path)}{bracket}'"
    if vcs := origin.get("vcs_info", {}).get("vcs"):
        revision = origin["vcs_info"].get("requested_revision") or origin["vcs_info"].get("commit_id")
        folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
        return f"pip install 'tunery{bracket} @ {vcs}+{url}{f'@{revision}' if revision else ''}{folder}'"
    return f"pip install 'tunery{bracket}'"
