"""One run of each tiny shape, shared by the tests of exports, which do not change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.export.runs import make_run, save_base


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of a shape, made when it is first asked for."""
    made: dict[str, Path] = {}

    def run(shape: str) -> Path:
        if shape not in made:
            folder = tmp_path_factory.mktemp(shape)
            made[shape] = make_run(folder, save_base(folder / "base", shape))
        return made[shape]

    return run
