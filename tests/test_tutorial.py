"""examples/tutorial.py: the LoRA layer under Hugging Face's own Trainer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs it")


def test_the_tutorials_steps_work_as_typed(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "examples" / "tutorial.py"
    result = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path), "--rows", "160", "--epochs", "3"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    share = re.search(r"trainable parameters: [\d,]+ of [\d,]+ \(([\d.]+)%\)", result.stdout)
    assert share
    assert 0 < float(share[1]) < 10
    losses = re.search(r"loss: ([\d.]+) at the start, ([\d.]+) at the end", result.stdout)
    assert losses
    assert float(losses[2]) < 0.7 * float(losses[1])
    assert "the base is unchanged, bit for bit" in result.stdout
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}
