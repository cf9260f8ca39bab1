"""Some parts of the GPU check, one after another in this process (see the package)."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_check.check import Check, Part

PARTS = {
    "facts": "machine",
    "resume": "recovery",
    "oom": "recovery",
    "step": "step",
    "eager": "step",
    "nf4": "step",
    "small": "small",
    "attention": "attention",
    "islands": "elementwise",
    "lora": "lora_ways",
}
"""Part → the module that holds the function of this name. Imported when its part begins: a module that cannot be
imported takes no other part with it."""


def part(name: str) -> Part:
    """The function that measures a part."""
    return getattr(importlib.import_module(f"bench.gpu_check.{PARTS[name]}"), name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU")
    options = parser.parse_args(arguments)
    check = Check(options.tiny, Path(os.environ.get("OUT", "runs/gpu-check")))
    for name in options.parts:
        started = time.perf_counter()
        check.attempt(name, functools.partial(_measure, name, check))
        check.say("done", what=name, seconds=round(time.perf_counter() - started, 1))


def _measure(name: str, check: Check) -> None:
    part(name)(check)


if __name__ == "__main__":
    main()
