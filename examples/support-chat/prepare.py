"""Conversations from the package `chatterbot-corpus` (BSD) as chat rows: data/train.jsonl and data/held-out.jsonl.

    pip install --no-deps chatterbot-corpus
    python examples/support-chat/prepare.py

The source repeats itself: of the 1,050 conversations in tech_support.yml, ten are different. Each conversation is taken
once, and no question of a held-out conversation occurs in training.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

FILES = ("tech_support", "coding", "computers", "trivia", "greetings", "conversations")
QUESTION_AND_ANSWERS = ("computers",)
"""In these files a list holds a question and several answers to it; in the others, people take turns."""

Turns = tuple[str, ...]
"""What is said in turn: user, assistant, user, …; it ends with the assistant."""


def source_folder() -> Path:
    """The English files inside the installed package, found without importing it."""
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package chatterbot-corpus is missing: pip install --no-deps chatterbot-corpus")
    return Path(package.submodule_search_locations[0]) / "data" / "english"


def read_conversations(folder: Path) -> list[Turns]:
    """Every conversation of FILES once, in the source's order."""
    found: dict[Turns, None] = {}
    for name in FILES:
        document = yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8"))
        for entry in document["conversations"]:
            if isinstance(entry, str):  # a slip in the source: a sentence that is part of no conversation
                continue
            said = [str(text).strip() for text in entry]
            if name in QUESTION_AND_ANSWERS:
                found.update(((said[0], answer), None) for answer in said[1:])
            else:
                found[tuple(said[: len(said) // 2 * 2])] = None
    return [turns for turns in found if all(turns)]


def questions(turns: Turns) -> set[str]:
    """What the user says, without case and punctuation."""
    return {" ".join(re.findall(r"\w+", text.casefold())) for text in turns[::2]}


def split(conversations: Sequence[Turns], held_out: int, seed: int) -> tuple[list[Turns], list[Turns]]:
    """Hold out `held_out` conversations, drawn with the seed; train on those that share no question with them."""
    order = list(conversations)
    random.Random(seed).shuffle(order)
    second = order[:held_out]
    asked = set[str]().union(*map(questions, second))
    return [turns for turns in order[held_out:] if not questions(turns) & asked], second


def write(path: Path, conversations: Iterable[Turns]) -> None:
    """JSON lines in OpenAI's form, {"messages": [{"role": …, "content": …}, …]}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for turns in conversations:
            roles = ("user", "assistant") * (len(turns) // 2)
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def main() -> None:
    """Read the options, write both files, and say so."""
    parser = argparse.ArgumentParser(description="Write data/train.jsonl and data/held-out.jsonl.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder for the files")
    parser.add_argument("--held-out", type=int, default=60, help="conversations held out")
    parser.add_argument("--seed", type=int, default=0, help="decides which conversations")
    options = parser.parse_args()
    train, held_out = split(read_conversations(source_folder()), options.held_out, options.seed)
    for name, rows in (("train.jsonl", train), ("held-out.jsonl", held_out)):
        write(options.out / name, rows)
        print(f"{options.out / name}: {len(rows):,} conversations")


if __name__ == "__main__":
    main()
