"""A curve in a file: written with the reason it is as it is, read, and compared with what a run gives now."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Line = dict[str, float]
"""{"step": …} and what was logged then: train_loss, grad_norm, valid_loss."""

FOLDER = Path(__file__).parent
RENEW = "python -m tests.golden.renew 'WHY IT MOVED'"


@dataclass(frozen=True)
class Tolerance:
    """How far a curve may be from the file.

    Attributes:
        of: "value": the relative difference of each value. "step": the absolute difference of each value. "mean": the
            absolute difference of the mean over all steps, for when rounding makes a single step uncertain.
    """

    limit: float
    of: Literal["value", "step", "mean"]

    def __str__(self) -> str:
        words = {"value": "each value, relative", "step": "each step", "mean": "the mean of all steps"}
        return f"{self.limit:g} ({words[self.of]})"


@dataclass(frozen=True)
class Move:
    """What a value is now, against the file; `distance` as its Tolerance measures it."""

    what: str
    held: float
    now: float
    distance: float

    def __str__(self) -> str:
        return f"{self.what} by {self.distance:.1e} (held {self.held:.7g}, now {self.now:.7g})"


def distances(held: Sequence[Line], now: Sequence[Line], tolerance: Tolerance) -> list[Move]:
    """One for each value, in the order of the steps; or one for each mean.

    Raises:
        ValueError: the curves do not have the same steps and values.
    """
    if [_shape(line) for line in held] != [_shape(line) for line in now]:
        raise ValueError("other steps or other values were logged than the file holds")
    if tolerance.of == "mean":
        keys = dict.fromkeys(key for line in held for key in line if key != "step")
        return [_move(f"the mean {key}", _mean(held, key), _mean(now, key), relative=False) for key in keys]
    return [
        _move(f"{key} at step {a['step']}", a[key], b[key], relative=tolerance.of == "value")
        for a, b in zip(held, now, strict=True)
        for key in a
        if key != "step"
    ]


def _shape(line: Line) -> tuple[float, frozenset[str]]:
    return line["step"], frozenset(line)


def _mean(curve: Sequence[Line], key: str) -> float:
    return statistics.fmean(line[key] for line in curve if key in line)


def _move(what: str, held: float, now: float, *, relative: bool) -> Move:
    distance = abs(now - held) / (abs(held) if relative and held else 1.0)
    return Move(what, held, now, math.inf if math.isnan(distance) else distance)


def how_it_moved(held: Sequence[Line], now: Sequence[Line], tolerance: Tolerance) -> str | None:
    """The first and the largest move beyond the tolerance, in words; None if there is none."""
    try:
        moves = distances(held, now, tolerance)
    except ValueError as error:
        return str(error)
    beyond = [move for move in moves if move.distance > tolerance.limit]
    if not beyond:
        return None
    largest = max(beyond, key=lambda move: move.distance)
    more = f", most {largest}" if largest != beyond[0] else ""
    return f"first {beyond[0]}{more}; {len(beyond)} of {len(moves)} values beyond {tolerance.limit:g}"


# --------------------------------------------------------------------------- files


def path_of(name: str, folder: Path = FOLDER) -> Path:
    """The file of a curve."""
    return folder / f"{name}.json"


def read(path: Path) -> dict[str, Any]:
    """The content of a curve's file; see `write`."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(
    path: Path,
    *,
    about: str,
    tolerance: Tolerance,
    versions: Mapping[str, str],
    processor: str,
    why: Sequence[Mapping[str, str]],
    curve: Sequence[Line],
) -> None:
    """Write a curve's file, a line of it for each line of the curve so that a change reads well.

    Args:
        why: [{"reason", "moved"}] of every renewal, the newest last.
    """
    head = {
        "about": about,
        "tolerance": str(tolerance),
        "renew": RENEW,
        "versions": dict(versions),
        "processor": processor,
        "why": list(why),
    }
    text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n    ".join(json.dumps({key: _rounded(value) for key, value in line.items()}) for line in curve)
    path.write_text(f'{text},\n  "curve": [\n    {lines}\n  ]\n}}\n', encoding="utf-8")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Which kind of processor this is, in words: equal kinds round alike."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines()]
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in lines}
    known = [f"{key} {facts[key]}" for key in ("vendor_id", "cpu family", "model") if key in facts]
    return ", ".join(known) or platform.machine()


def _rounded(value: float) -> float:
    """Nine digits: all that float32 holds."""
    return value if isinstance(value, int) else float(f"{value:.9g}")
