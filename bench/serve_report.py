"""The section "Serving" of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench import plan
from bench.tables import processor, table

MIXED_GOAL, PEFT_GOAL = 0.85, 3.0
AGREEMENT = 0.25
"""Largest difference of a first token's log-probability between tunery and PEFT."""

ABOUT = """\
{rows} questions at once, {prompt} tokens each, answered with {answer} tokens each by {model} in {dtype}; and
{questions} questions of {low} to {high} tokens, answered with {low} to {high} tokens, {rows} at a time. Prompts are
random tokens, nothing shared. Adapters are random, rank {rank} on all linear layers, {adapters} of them; in the mixed
batches every {adapters}th row has the same one. PEFT computes the same rows with `generate(adapter_names=…)`, its
adapters in the dtype of the base: rows of different lengths are padded, and a batch lasts until its longest
answer ends, while with tunery a row that ends makes room for the next. Speeds count answered tokens, the prompts' time
included. All are timed in turn, each side in a process of its own; the median of {rounds} rounds after one to warm up,
ratios by round. The first token is that of a prompt of {first_prompt} tokens: alone, and while {others} other rows over
all adapters are being answered.
"""


def serve_section(results: Mapping[str, Any]) -> list[str]:
    """Where, goals, speeds, and the time to the first token."""
    machine = results["machine"]
    where = (
        f"{processor(machine)}, {machine['threads']} threads; {results['created']}, commit {results['commit']}, "
        f"`{results['command']}`.\n"
    )
    about = ABOUT.format(
        **results_of(results, "rows", "prompt", "answer", "questions", "dtype", "adapters", "first_prompt"),
        low=results["lengths"][0],
        high=results["lengths"][1],
        model=plan.MODEL,
        rank=plan.RANK,
        rounds=len(results["rounds"]),
        others=results["rows"] - 1,
    )
    parts = ["## Serving\n", where, about, table(("goal", "", "measured", ""), _goals(results)), ""]
    parts += [
        table(("batch", "tokens/s"), _speeds(results)),
        "",
        table(("first token", "median", "range"), _waits(results)),
        "",
    ]
    return parts


def results_of(results: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Some of the results, by name."""
    return {name: results[name] for name in names}


def agree(results: Mapping[str, Any]) -> bool:
    """Whether tunery and PEFT computed the same."""
    return results["disagreement"] <= AGREEMENT


def _ratio(results: Mapping[str, Any], one: str, other: str) -> float:
    return statistics.median(run[one] / run[other] for run in results["rounds"])


def _goals(results: Mapping[str, Any]) -> list[list[str]]:
    mixed = _ratio(results, "mixed", "single")
    rows = [["mixed adapters against one", f"≥ {MIXED_GOAL:g} ×", f"{mixed:.2f} ×", _verdict(mixed, MIXED_GOAL)]]
    for end, words in (("_lengths", "different lengths"), ("", "equal lengths")):
        title, goal = f"mixed adapters against PEFT, {words}", f"≥ {PEFT_GOAL:g} ×"
        if agree(results):
            ratio = _ratio(results, "mixed" + end, "peft" + end)
            rows.append([title, goal, f"{ratio:.1f} ×", _verdict(ratio, PEFT_GOAL)])
        else:
            why = f"log-probabilities differ by {results['disagreement']:.2f}"
            rows.append([title, goal, f"no ratio: {why}", "missed"])
    return rows


def _verdict(value: float, goal: float) -> str:
    return "reached" if value >= goal else "missed"


def _speeds(results: Mapping[str, Any]) -> list[list[str]]:
    names = {
        "base": "tunery, the base alone",
        "single": "tunery, one adapter",
        "mixed": f"tunery, {results['adapters']} adapters",
        "peft": f"PEFT, {results['adapters']} adapters",
        "mixed_lengths": f"tunery, {results['adapters']} adapters, different lengths",
        "peft_lengths": f"PEFT, {results['adapters']} adapters, different lengths",
    }
    return [[title, f"{statistics.median(run[n] for run in results['rounds']):,.0f}"] for n, title in names.items()]


def _waits(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, title in (("first_token_alone", "alone"), ("first_token_loaded", "under load")):
        times = [1000 * seconds for seconds in results[name]]
        rows.append([title, f"{statistics.median(times):,.0f} ms", f"{min(times):,.0f} to {max(times):,.0f} ms"])
    return rows
