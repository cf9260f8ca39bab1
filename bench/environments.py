"""A virtual environment for each peer, built on first use and again when its pins change."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

from bench.plan import ROOT

FOLDER = ROOT / ".venv-bench"
PINS = ROOT / "bench" / "requirements"
STAMP = ".installed"


NO_INDEX = "(from versions: none)"
"""What pip says of a pinned package where no package index can be reached."""

_failures: dict[str, str] = {}
"""Environments that could not be built in this process, and why."""


class EnvironmentFailed(Exception):
    """An environment could not be built; the message says why."""


def python_of(name: str) -> str:
    """The interpreter of an environment, built if need be; "" is the one that runs now.

    Raises:
        EnvironmentFailed: pip could not install the pins. It is tried once in a process, and where no package index can
            be reached not for the other environments either.
    """
    if not name:
        return sys.executable
    folder = FOLDER / name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    pins = PINS / f"{name}.txt"
    wanted = stamp(pins)
    written = folder / STAMP
    if written.exists() and written.read_text(encoding="utf-8") == wanted:
        return str(python)
    for other, why in _failures.items():
        if other == name or NO_INDEX in why:
            raise EnvironmentFailed(why if other == name else f"no package index can be reached, as for {other}")
    print(f"building {folder.relative_to(ROOT)} from {pins.relative_to(ROOT)} …", file=sys.stderr, flush=True)
    written.unlink(missing_ok=True)
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", str(pins)])
    except EnvironmentFailed as error:
        _failures[name] = str(error)
        raise
    written.write_text(wanted, encoding="utf-8")
    return str(python)


def stamp(pins: Path) -> str:
    """What an environment was built from: the pins and the version of Python."""
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    return f"{digest} {'.'.join(platform.python_version_tuple()[:2])}"


def _run(command: list[str]) -> None:
    # The Makefile holds pip to the project's own versions; peers have theirs.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EnvironmentFailed(f"{' '.join(command[:4])} … failed: {result.stderr.strip()[-600:]}")
