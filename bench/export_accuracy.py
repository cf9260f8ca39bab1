"""Does a classification run answer the same everywhere? Its exports are made, verified, and judged on held-out rows.

    python -m bench.export_accuracy runs/sentiment --rows 500

For each format: how far its log-probabilities are from the adapter's (what `tunery export` measures), the accuracy on
the rows in the program it is for, and on how many rows the label is another one than in tunery. It ends with exit
code 1 where an accuracy is more than a point from tunery's, or every format was refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tunery
from tunery.console import Console
from tunery.data.read import read_data
from tunery.errors import TuneryError
from tunery.evaluation.labels import LabelRows, label_rows, score_labels
from tunery.evaluation.tuned import TunedModel
from tunery.export.llama_cpp import ask_llama
from tunery.export.token_scores import make_probe
from tunery.training.scoring import Scorer

ALLOWED = 0.01
"""How far an accuracy may be from tunery's."""

FORMATS = ("gguf f16", "gguf bf16", "gguf q8_0", "gguf q4_k_m", "gguf q4_0", "gguf-adapter f32")


def held_out(tuned: TunedModel, rows: int) -> LabelRows:
    """Every label of the first held-out rows."""
    data = read_data(tuned.task.data, tuned.task.seed)
    return label_rows(tuned.renderer, (data.held_out[1])[:rows], tuned.limit, tuned.task.data.too_long)


def predicted_by_llama(given: LabelRows, labels: int, model: Path, adapter: Path | None) -> np.ndarray:
    """The likeliest label of each row in llama.cpp, by the same sums of log-probabilities. int64 [n]"""
    probes = [
        make_probe(row.ids.tolist(), np.flatnonzero(row.weights).tolist(), positions=1 << 20) for row in given.rows
    ]
    answers = ask_llama(model, adapter=adapter, probes=probes, top=1)
    sums = np.asarray([sum(place["logprob"] for place in row) for row in answers.scores])
    return sums.reshape(-1, labels).argmax(axis=1)


def measure(run: Path, form: str, given: LabelRows, mine: np.ndarray, labels: int, base: Path | None) -> dict[str, Any]:
    """One export: made, verified and judged."""
    to, _, numbers = form.partition(" ")
    with tempfile.TemporaryDirectory(prefix="tunery-export-") as folder:
        try:
            done = tunery.export_run(
                run, to, quantize=numbers or None, out=Path(folder) / "out", progress=Console(quiet=True)
            )
        except TuneryError as error:
            return {"format": form, "refused": error.message}
        file = next(done.path.glob("*.gguf"))
        adapter = file if to == "gguf-adapter" else None
        if adapter is not None and base is None:
            return {"format": form, "refused": "the base is no GGUF file; name one with --base"}
        theirs = predicted_by_llama(given, labels, base if adapter is not None and base else file, adapter)
        return {
            "format": form,
            "megabytes": round(file.stat().st_size / 1e6, 1),
            "accuracy": float((theirs == given.truth).mean()),
            "other_labels": int((theirs != mine).sum()),
            **done.record["comparison"]["difference"],
        }


def report(rows: int, accuracy: float, results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        f"{rows} held-out rows; accuracy in tunery {accuracy:.1%}",
        "",
        "| format | MB | accuracy | other labels | mean difference | largest | KL | same first choice |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        if "refused" in result:
            lines.append(f"| {result['format']} | refused: {result['refused']} |")
            continue
        lines.append(
            f"| {result['format']} | {result['megabytes']} | {result['accuracy']:.1%} | {result['other_labels']} "
            f"| {result['mean_difference']:.2g} | {result['max_difference']:.2g} | {result['kl']:.2g} "
            f"| {result['same_choice']:.1%} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and say whether all accuracies are alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--base", type=Path, help="GGUF file of the base, for gguf-adapter; left out, the run's own")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args()
    tuned = tunery.load(options.run)
    given, labels = held_out(tuned, options.rows), len(tuned.renderer.labels)
    mine = score_labels(Scorer(tuned.flat), given, labels).predicted
    accuracy = float((mine == given.truth).mean())
    base = options.base or (Path(tuned.base.info.source) if tuned.base.info.source.endswith(".gguf") else None)
    del tuned
    results = []
    for form in options.formats.split(","):
        sys.stderr.write(f"{form} …\n")
        results.append(measure(options.run, form, given, mine, labels, base))
    print(report(len(given.truth), accuracy, results))
    if options.json:
        options.json.write_text(json.dumps({"accuracy": accuracy, "results": results}, indent=2) + "\n")
    return exit_code(accuracy, results)


def exit_code(accuracy: float, results: Sequence[dict[str, Any]]) -> int:
    """1 where an accuracy is too far from tunery's, or nothing could be judged."""
    judged = [result["accuracy"] for result in results if "accuracy" in result]
    return int(not judged or any(abs(found - accuracy) > ALLOWED for found in judged))


if __name__ == "__main__":
    sys.exit(main())
