"""A tiny base model for jobs that really train."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import save_tiny_llama

QUICK: dict[str, Any] = {
    "lora": {"rank": 4},
    "train": {"precision": "float32", "learning_rate": 0.01},
    "evaluate": {"generate_rows": 2, "max_new_tokens": 4},
}
"""Settings for all jobs under which a tiny model learns something in seconds."""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("base")))


@pytest.fixture
def quick() -> dict[str, Any]:
    return QUICK
