"""Film reviews that a tiny model learns in a few seconds, and a finished run on them."""

from __future__ import annotations

import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path

import tunery
from tunery.console import Console


@dataclass(frozen=True)
class Films:
    """A finished run. Tests read it; one that writes makes a project of its own.

    Attributes:
        run: as `train` returned it, with a path relative to `project`.
        path: the run directory.
    """

    project: Path
    run: tunery.Run

    @property
    def path(self) -> Path:
        """The run directory, from everywhere."""
        return self.project / self.run.path


def write_films(folder: Path, base: Path) -> Path:
    """A folder with a task and 80 rows."""
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(80):
            writer.writerow([f"film {i} is {'fine' if i % 2 else 'dull'}", "good" if i % 2 else "bad"])
    (folder / "task.yaml").write_text(
        f"name: films\nmodel: {base}\ndata:\n  train: rows.csv\n  validation: 16\n  instruction: good or bad?\n"
        "lora:\n  rank: 4\ntrain:\n  epochs: 3\n  batch_size: 8\n  learning_rate: 0.02\n  precision: float32\n"
    )
    return folder


def train_films(folder: Path, base: Path) -> Films:
    """The run of `write_films`, finished."""
    write_films(folder, base)
    with contextlib.chdir(folder):
        return Films(folder, tunery.train("task.yaml", progress=Console(quiet=True)))
