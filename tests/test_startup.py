"""Quick to start, and honest about how long it took."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunery.startup import SPIN_COUNT, collector_paused, seconds_since_start


def test_the_collector_is_paused_and_then_as_it_was() -> None:
    assert gc.isenabled()
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_time_since_the_start_of_the_process() -> None:
    program = "import time; time.sleep(0.5); from tunery.startup import seconds_since_start as s; print(s())"
    before = time.monotonic()
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 0.5 <= float(said) <= time.monotonic() - before + 0.02


def test_without_linux_it_is_what_psutil_says(tmp_path: Path) -> None:
    assert abs(seconds_since_start(tmp_path / "absent") - seconds_since_start()) < 2


def test_training_needs_no_library_that_it_does_not_use() -> None:
    program = "import sys, tunery.api; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    for name in (
        "bitsandbytes",
        "datasets",
        "gguf",
        "pandas",
        "peft",
        "pyarrow",
        "sacrebleu",
        "sklearn",
        "torchvision",
    ):
        assert name not in loaded, name


def says(program: str, **environment: str) -> str:
    """What a fresh interpreter prints that was told nothing about OpenMP but this."""
    told = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=told | environment).stdout.strip()


def test_openmp_threads_are_told_to_spin_briefly_before_torch_is_loaded() -> None:
    program = "import os, sys, tunery; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert says(program) == str(SPIN_COUNT)
    assert says(program, GOMP_SPINCOUNT="7") == "7"
    assert says(program, OMP_WAIT_POLICY="active") == "None"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP computes for PyTorch under Linux only")
def test_who_imports_torch_first_is_told_what_that_costs() -> None:
    program = "import torch, tunery; from tunery.startup import spinning_warning; print(spinning_warning())"
    assert f"import tunery first, or set GOMP_SPINCOUNT={SPIN_COUNT}" in says(program)
    assert says(program, GOMP_SPINCOUNT="7") == "None"
    assert says(program.replace("torch, tunery", "tunery, torch")) == "None"
