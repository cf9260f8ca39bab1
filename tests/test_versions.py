"""A version is a fact of the receipt; not knowing it loses no run."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import tunery
from tunery import versions
from tunery.training import receipt

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
