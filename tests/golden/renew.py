"""Renew the golden curves that have moved, with the reason.

    python -m tests.golden.renew 'the gradient is divided by the trained tokens of the batch'

Trains every run of tests/golden/runs.py. A curve within its tolerance keeps its file as it is; one that moved gets a
new file with the reason, the versions, and how far it moved.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.golden import curve
from tests.golden.runs import RUNS, Golden
from tunery.training.build_receipt import versions

LEAST_WORDS = 3
"""A reason of fewer explains nothing."""


def renew(
    reason: str, names: Sequence[str] = (), *, runs: Mapping[str, Golden] = RUNS, folder: Path = curve.FOLDER
) -> dict[str, str]:
    """Renew the files of the curves that moved.

    Args:
        reason: why they moved; it goes into the files.
        names: of which curves; all, if there are none.

    Returns:
        What happened to each, in words.

    Raises:
        ValueError: the reason says too little, or a name is unknown.
    """
    if len(reason.split()) < LEAST_WORDS:
        raise ValueError(f"say in a few words why the curves moved, not {reason!r}")
    if unknown := [name for name in names if name not in runs]:
        raise ValueError(f"no such curve: {', '.join(unknown)}; there are {', '.join(runs)}")
    return {name: _renew(name, runs[name], " ".join(reason.split()), folder) for name in names or runs}


def _renew(name: str, run: Golden, reason: str, folder: Path) -> str:
    if why_not := run.why_not():
        return f"not trained here: {why_not}"
    with tempfile.TemporaryDirectory() as scratch:
        now = run.record(Path(scratch))
    path = curve.path_of(name, folder)
    held = curve.read(path) if path.exists() else None
    moved = run.how_it_moved(held, now) if held else "a new curve"
    if moved is None:
        return "unmoved"
    why = [*(held["why"] if held else []), {"reason": reason, "moved": moved}]
    curve.write(
        path,
        about=run.about,
        tolerance=run.tolerance,
        versions=versions(),
        processor=curve.processor(),
        why=why,
        curve=now,
    )
    return f"renewed: {moved}"


def main() -> None:
    """Read the options, renew, and say what was done."""
    parser = argparse.ArgumentParser(description="Renew the golden curves that have moved, with the reason.")
    parser.add_argument("reason", help="why they moved, in a few words; it is written into the files")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=f"of {', '.join(RUNS)}")
    options = parser.parse_args()
    try:
        done = renew(options.reason, options.only)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write("".join(f"{name}: {words}\n" for name, words in done.items()))


if __name__ == "__main__":
    main()
