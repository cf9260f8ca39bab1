"""From what the programs said to figures: speeds, ratios, and whether a speed counts at all."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench import plan

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """A median with its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Figures:
    """A program on a workload.

    Attributes:
        problem: what is said in place of a speed; then the speeds are None.
        data_tokens, trained_tokens, pairs: a second; pairs only for preference pairs.
        share: of the matmul rate measured in that run, by the operations that the program could not avoid:
            tunery's for the tokens it computes, a peer's for every token of the data once (its padding and
            recomputation left out).
        peak_bytes: most resident memory; startup: seconds from the process's start to its first step.
        at_once: rows (or pairs) computed at a time.
        ratio: tunery's speed over this one's, step by step; None for tunery itself.
    """

    name: str
    title: str
    problem: str | None = None
    data_tokens: Spread | None = None
    trained_tokens: float | None = None
    pairs: float | None = None
    share: float | None = None
    peak_bytes: int | None = None
    startup: float | None = None
    at_once: int | None = None
    ratio: Spread | None = None


def timed(run: Run) -> list[Mapping[str, Any]]:
    """The steps that count: all but the first."""
    return list(run.get("steps", ()))[1:]


def losses(run: Run) -> list[float]:
    """Of every step, the first too."""
    return [step["loss"] for step in run.get("steps", ())]


def same_work(ours: Run, theirs: Run) -> str | None:
    """Why two runs did not train the same tokens; None if they did."""
    for what, key in (("tokens", "data_tokens"), ("trained tokens", "trained_tokens")):
        a, b = ([step[key] for step in run["steps"]] for run in (ours, theirs))
        if a != b:
            return f"other {what}: {sum(b):,} against tunery's {sum(a):,}"
    if ours["trainable"] != theirs["trainable"]:
        return f"another adapter: {theirs['trainable']:,} numbers against tunery's {ours['trainable']:,}"
    return None


def float32_differs(ours: Run, theirs: Run) -> str | None:
    """Why the losses of the float32 check do not agree; None if they do."""
    for run, who in ((ours, "tunery"), (theirs, "")):
        if run.get("failed"):
            return f"float32 check: {who} {run['failed']}".replace("  ", " ")
    if why := same_work(ours, theirs):
        return f"float32 check: {why}"
    for number, (a, b) in enumerate(zip(losses(ours), losses(theirs), strict=True), 1):
        if not abs(a - b) <= plan.AGREEMENT_FLOAT32 * abs(b):
            return f"losses differ in float32, step {number}: {b:.5f} against tunery's {a:.5f}"
    return None


def curves_differ(ours: Run, theirs: Run) -> str | None:
    """Why the loss curves in the timed format do not agree; None if they do: mean difference over mean loss."""
    a, b = losses(ours), losses(theirs)
    apart = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / sum(abs(y) for y in b)
    return None if apart <= plan.AGREEMENT else f"loss curves are {apart:.1%} apart ({_curve(b)} against {_curve(a)})"


def _curve(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def judge(name: str, title: str, comparison: Mapping[str, Any], check: str | None, batch: int, kind: str) -> Figures:
    """A peer against tunery.

    Args:
        comparison: {"tunery": run, "other": run}, taken in turn.
        check: what the float32 check found wrong, if anything.
        batch: pairs in a step, where `kind` is "pairs".
    """
    ours, theirs = comparison["tunery"], comparison["other"]
    if theirs.get("failed"):
        return Figures(name, title, theirs["failed"])
    problem = check
    if not problem and not ours.get("failed"):
        problem = same_work(ours, theirs) or curves_differ(ours, theirs)
    if problem:
        return Figures(name, title, problem, peak_bytes=_peak(theirs), startup=theirs["startup_seconds"])
    ratio = None
    if not ours.get("failed"):
        ratio = Spread.of([b["seconds"] / a["seconds"] for a, b in zip(timed(ours), timed(theirs), strict=True)])
    return _figures(name, title, [theirs], batch, kind, ours.get("steps", ()), ratio)


def judge_tunery(runs: Sequence[Run], batch: int, kind: str) -> Figures:
    """tunery over all its runs on a workload (one beside each peer)."""
    sound = [run for run in runs if not run.get("failed")]
    if not sound:
        return Figures("tunery", "tunery", runs[0]["failed"] if runs else "was not run")
    steps = [step for run in sound for step in run["steps"]]
    return _figures("tunery", "tunery", sound, batch, kind, steps, None)


def _figures(
    name: str,
    title: str,
    runs: Sequence[Run],
    batch: int,
    kind: str,
    ours: Sequence[Mapping[str, Any]],
    ratio: Spread | None,
) -> Figures:
    steps = [step for run in runs for step in timed(run)]
    return Figures(
        name,
        title,
        None,
        Spread.of([step["data_tokens"] / step["seconds"] for step in steps]),
        statistics.median(step["trained_tokens"] / step["seconds"] for step in steps),
        statistics.median(batch / step["seconds"] for step in steps) if kind == "pairs" else None,
        _share(steps, ours),
        max(_peak(run) for run in runs),
        statistics.median(run["startup_seconds"] for run in runs),
        ratio=ratio,
    )


def _share(steps: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> float | None:
    """Median over the steps; the rate, and the operations of a peer's step, are those tunery measured beside it."""
    beside = {step["step"]: step for step in ours if "matmul_rate" in step}
    shares = []
    for step in steps:
        known = step if "flops" in step else beside.get(step["step"])
        if known:
            flops = step["flops"] if "flops" in step else known["plain_flops"]
            shares.append(flops / step["seconds"] / known["matmul_rate"])
    return statistics.median(shares) if shares else None


def _peak(run: Run) -> int:
    return max((step["peak_bytes"] + step.get("workers_peak_bytes", 0) for step in run["steps"]), default=0)


def all_figures(results: Mapping[str, Any], workload: Mapping[str, Any]) -> list[Figures]:
    """tunery first, then the peers in the order of the plan."""
    chosen = next(p for p in plan.WORKLOADS if p.name == workload["name"])
    comparisons = workload["comparisons"]
    figures = [judge_tunery([c["tunery"] for c in comparisons.values()], chosen.batch_size, chosen.kind)]
    checks = results["checks"].get(chosen.kind, {})
    for peer in plan.peers_of(chosen):
        if peer.name in comparisons:
            check = float32_differs(checks["tunery"], checks[peer.name]) if peer.name in checks else "was not checked"
            if check and checks.get("tunery", {}).get("failed"):
                check = None  # without tunery there is nothing to agree with; the peer's speed stands alone
            comparison = comparisons[peer.name]
            figures.append(judge(peer.name, peer.title, comparison, check, chosen.batch_size, chosen.kind))
    at_once = workload["micro_batch"]
    return [replace(f, at_once=at_once.get(f.name, chosen.batch_size)) for f in figures]
