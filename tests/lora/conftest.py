"""What tests of adapters share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lora.test_attach import randomise
from tests.support.shapes import tiny_model
from tunery.fast.adapters import apply_lora
from tunery.lora.adapter import save_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter for llama, to be spoilt."""
    model = apply_lora(tiny_model("llama"), rank=2)
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"
