"""A version is a fact of the receipt; not knowing it loses no run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tunery
from tunery import versions
from tunery.training import build_receipt as receipt

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where tunery runs from its sources, with no metadata of its own."""
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "tunery":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_of_what_is_installed_and_what_is_not() -> None:
    assert versions.version_of("numpy") == importlib.metadata.version("numpy")
    assert versions.version_of("no-such-distribution") == "unknown"


def test_tunery_run_from_its_sources_knows_its_version(uninstalled: None) -> None:
    declared = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
    assert tunery.__version__ == receipt.versions()["tunery"] == declared


@pytest.mark.parametrize("content", [None, "[project]\nname = 'other'\nversion = '9'\n", "not toml ["])
def test_sources_without_a_version_of_tunery(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "pyproject.toml").write_text(content, encoding="utf-8")
    assert versions._source_version(tmp_path) == "unknown"


# --------------------------------------------------------------------------- lower bounds

UNTRIED = {"trackio"}
"""Not installed by `make test-oldest`: its Gradio asks for a newer FastAPI than the oldest one that tunery takes."""

BESIDE = {"pyarrow"}
"""Named there so that the others work together."""


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    bounds: dict[str, str] = {}
    for requirement in declared:
        found = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement)
        assert found, f"{requirement} has no lower bound"
        name, version = found.groups()
        assert bounds.setdefault(name, version) == version, f"{name} has two lower bounds"
    constraints = PYPROJECT.with_name("constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in constraints if not line.startswith("#"))
    for name, version in bounds.items():
        if name not in UNTRIED:
            assert _numbers(tested[name]) == _numbers(version), name
    assert set(tested) == set(bounds) - UNTRIED | BESIDE


def _numbers(version: str) -> list[int]:
    parts = [int(part) for part in version.split(".")]
    return parts + [0] * (4 - len(parts))


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'tunery[serve]'"),
        (
            {"url": "file:///home/a%20b/tunery", "dir_info": {"editable": True}},
            "pip install -e '/home/a b/tunery[serve]'",
        ),
        ({"url": "file:///home/me/tunery", "dir_info": {}}, "pip install '/home/me/tunery[serve]'"),
        ({"url": "file:///tmp/tunery-0.1-py3-none-any.whl", "archive_info": {}}, "pip install 'tunery[serve]'"),
        (
            {"url": "https://example.org/tunery.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip install 'tunery[serve] @ git+https://example.org/tunery.git@1'",
        ),
        (
            {
                "url": "https://example.org/all.git",
                "vcs_info": {"vcs": "git", "requested_revision": "v0.1", "commit_id": "1"},
                "subdirectory": "tunery",
            },
            "pip install 'tunery[serve] @ git+https://example.org/all.git@v0.1#subdirectory=tunery'",
        ),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="paths as POSIX writes them")
def test_an_extra_is_installed_from_where_tunery_was(
    origin: dict[str, Any] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            return json.dumps(origin) if origin and name == "direct_url.json" else None

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert versions.install_command("serve") == command


def test_an_extra_for_sources_that_were_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert versions.install_command("hosted") == f"pip install -e '{PYPROJECT.parent}[hosted]'"


def test_every_extra_that_an_error_names_exists() -> None:
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    sources = (PYPROJECT.parent / "src" / "tunery").rglob("*.py")
    named = {name for file in sources for name in re.findall(r'install_command\("(\w+)"\)', file.read_text("utf-8"))}
    assert named
    assert named <= set(extras)
