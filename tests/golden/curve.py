"""A curve in a file: written with the reason it is as it is, read, and compared with what a run gives now."""

from __future__ import annotations

import json
import math
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
        of: "each value": its relative difference. "mean so far": the absolute difference of the mean from the first
            step to each, for runs whose rounding makes a single step's loss uncertain.
    """

    limit: float
    of: Literal["each value", "mean so far"]

    def __str__(self) -> str:
        return f"{self.of} within {self.limit:g}" + (" relative" if self.of == "each value" else "")


@dataclass(frozen=True)
class Move:
    """Where a curve is now, against the file; `distance` as its Tolerance measures it."""

    key: str
    step: int
    held: float
    now: float
    distance: float

    def __str__(self) -> str:
        return f"{self.key} at step {self.step} by {self.distance:.1e} (held {self.held:.7g}, now {self.now:.7g})"


def distances(held: Sequence[Line], now: Sequence[Line], tolerance: Tolerance) -> list[Move]:
    """One for each value, in the order of the steps.

    Raises:
        ValueError: the curves do not have the same steps and values.
    """
    if [list(line) for line in held] != [list(line) for line in now] or _steps(held) != _steps(now):
        raise ValueError("other steps or other values were logged than the file holds")
    moves: list[Move] = []
    sums: dict[str, tuple[int, float, float]] = {}
    for a, b in zip(held, now, strict=True):
        for key in (key for key in a if key != "step"):
            was, is_ = a[key], b[key]
            if tolerance.of == "mean so far":
                count, before, after = sums.get(key, (0, 0.0, 0.0))
                sums[key] = count, before, after = count + 1, before + was, after + is_
                was, is_ = before / count, after / count
                distance = abs(is_ - was)
            else:
                distance = abs(is_ - was) / abs(was) if was else abs(is_)
            moves.append(Move(key, int(a["step"]), was, is_, math.inf if math.isnan(distance) else distance))
    return moves


def _steps(curve: Sequence[Line]) -> list[float]:
    return [line["step"] for line in curve]


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
    why: Sequence[Mapping[str, str]],
    curve: Sequence[Line],
) -> None:
    """Write a curve's file, a line of it for each line of the curve so that a change reads well.

    Args:
        why: [{"reason", "moved"}] of every renewal, the newest last.
    """
    head = {
        "about": about, "tolerance": str(tolerance), "renew": RENEW, "versions": dict(versions), "why": list(why),
    }  # fmt: skip
    text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n    ".join(json.dumps({key: _rounded(value) for key, value in line.items()}) for line in curve)
    path.write_text(f'{text},\n  "curve": [\n    {lines}\n  ]\n}}\n', encoding="utf-8")


def _rounded(value: float) -> float:
    """Nine digits: all that float32 holds."""
    return value if isinstance(value, int) else float(f"{value:.9g}")
