"""The section "Beside other programs" of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.neighbours import ANSWER_TOKENS, CLIENTS, GOAL, NEIGHBOURS, STEPS
from bench.tables import processor, table

ABOUT = f"""\
The sentiment task, batch 16, as in the first table: {STEPS} steps alone, then {STEPS} beside a program that computes
without a pause. Mean seconds per step, and the ratio of the seconds per computed token. Programs of one login session
share the cores by their priority, so one that uses all cores at normal priority is due half of them.
"""

ABOUT_SERVING = f"""\
One `tunery serve`: {CLIENTS} clients ask the base for {ANSWER_TOKENS} tokens again and again; a job trains on short
conversations; then both at the same time.
"""


def neighbour_section(results: Mapping[str, Any]) -> list[str]:
    """Training beside each neighbour, and serving beside training."""
    machine = results["machine"]
    where = (
        f"{processor(machine)}, {machine['threads']} threads; {results['created']}, commit {results['commit']}, "
        f"`{results['command']}`.\n"
    )
    parts = ["## Beside other programs\n", where]
    if results["steps"]:
        header = ("beside", "alone", "beside it", "times as long", "goal", "")
        parts += [ABOUT, table(header, [_row(run) for run in results["steps"]]), ""]
    if results["serve"]:
        parts += [ABOUT_SERVING, table(("", "alone", "both", "kept", "goal", ""), _serving(results["serve"])), ""]
    return parts


def _row(run: Mapping[str, Any]) -> list[str]:
    neighbour = next(n for n in NEIGHBOURS if n.name == run["neighbour"])
    alone, beside = run["alone"], run["beside"]
    ratio = per_token(beside) / per_token(alone)
    goal = "" if neighbour.goal is None else f"≤ {neighbour.goal:g}"
    verdict = "" if neighbour.goal is None else "reached" if ratio <= neighbour.goal else "missed"
    title = neighbour.title if run["spin"] is None else f"{neighbour.title}, spin count {run['spin']}"
    seconds = (f"{statistics.mean(step['seconds'] for step in steps):.2f} s" for steps in (alone, beside))
    return [title, *seconds, f"{ratio:.2f}", goal, verdict]


def per_token(steps: Sequence[Mapping[str, float]]) -> float:
    """Seconds that a computed token takes."""
    return sum(step["seconds"] for step in steps) / sum(step["computed_tokens"] for step in steps)


def _serving(speeds: Mapping[str, float]) -> list[list[str]]:
    rows = []
    for name, unit in (("answers", "tokens/s"), ("training", "steps/min")):
        alone, beside = speeds[f"{name}_alone"], speeds[f"{name}_beside"]
        verdict = "reached" if beside >= GOAL * alone else "missed"
        rows.append(
            [name, f"{alone:,.1f} {unit}", f"{beside:,.1f} {unit}", f"{beside / alone:.2f}", f"≥ {GOAL:g}", verdict]
        )
    return rows
