"""Quick to start, and honest about how long it took."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path

from tunery.startup import collector_paused, seconds_since_start


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
