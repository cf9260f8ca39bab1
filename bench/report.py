"""docs/benchmarks.md from the recorded results, and the same tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plan
from bench.judge import Figures, Spread, all_figures
from bench.tables import processor, table

RESULTS = plan.ROOT / "bench" / "results"
TARGET = plan.ROOT / "docs" / "benchmarks.md"
MEMORY_GOAL = 0.5
"""Peak memory on long free text against the fastest peer's."""

HOW_TO_READ = f"""\
## How to read it

Each workload is written once as tokenised rows. Every program starts from the same base and the same adapter
and trains the same rows in the same order: rank {plan.RANK} and alpha {plan.ALPHA:.0f} on all linear layers,
AdamW without weight decay at a constant rate, gradients clipped to norm {plan.MAX_GRAD_NORM:.0f}. The dtype
is the one that tunery's probe chooses for the machine.

- **tunery is … times as fast** is the result: the ratio of two neighbouring steps, tunery's and the peer's,
  which work in turn on the same batch. The median of {plan.REPEATS} such pairs after one step to warm up, with
  the range in brackets. Times drift with the machine; ratios hardly do.
- **Tokens/s** count each row's tokens in full, whatever a program computed; padding never counts. **Trained**
  tokens are those with a label.
- **At a time** is how many rows (or pairs) of the batch a program computes together; for TRL at its defaults and
  tunery the whole batch, for the others the one of those tried that took the least processor time.
- **Peak memory** is what the process held at most, libraries and the loading of the model included.
- **Share** is the part of the machine's matmul rate, measured beside each step, that the necessary
  operations reached: tunery's for the tokens it computes, a peer's for all tokens of the data once. A peer's
  padding and recomputation are not counted as work, nor is attention itself.
- **Start-up** is from the start of the process to its first step: imports, loading, attaching. Rows come
  tokenised.

A speed is printed only if the losses agree: {plan.CHECK_STEPS} steps in float32 within
{plan.AGREEMENT_FLOAT32:g}, the tokens and trained tokens counted and equal, and the loss curve of the timed run
within {plan.AGREEMENT:.0%}. Otherwise the words of what disagreed stand there.

The peers:

- **TRL + PEFT, its defaults** sets nothing but batch size, rank, targets, learning rate and schedule, seed and
  number of steps, and that there is no GPU, without which TRL does not start: float32 weights under bfloat16
  autocast, and gradient checkpointing. TRL leaves autocast on where a processor must emulate bfloat16; where the
  dtype is float32 it is switched off here, since a step would take ten times the processor time.
- **TRL + PEFT, tuned by hand**: weights in that dtype, no checkpointing, a smaller micro-batch
  with accumulation. TRL's entropy and accuracy cannot be switched off.
- **PEFT in a bare loop**: padded rows, logits at all positions, nothing around it.
- **LitGPT**: its LoRA model with its fused qkv, its chunked head and cross-entropy, its adapter in the dtype
  of the base.
- **Unsloth** on its CPU backend, with the newest TRL and transformers that it allows. Set: what is set for TRL
  tuned by hand, and the base's dtype. Left: its loader, its LoRA, its loss in chunks. It promises SFT on a
  CPU only; its DPO runs too.
"""


def main_report() -> str:
    """The whole page, from whatever results are there."""
    found = {name: load(name) for name in ("cpu", "neighbour", "scaling", "serve", "gpu")}
    made_by = "`make bench`, `make bench-neighbour`, `make bench-scaling`, `make bench-serve` and `make bench-gpu`"
    parts = ["# Benchmarks\n", f"Written by {made_by}; do not edit.\n"]
    if not any(found.values()):
        parts.append("Nothing is recorded yet.")
    if found["cpu"]:
        parts += cpu_section(found["cpu"])
    if found["neighbour"]:
        from bench.neighbour_report import neighbour_section

        parts += neighbour_section(found["neighbour"])
    if found["scaling"]:
        from bench.scaling_report import scaling_section

        parts += scaling_section(found["scaling"])
    if found["serve"]:
        from bench.serve_report import serve_section

        parts += serve_section(found["serve"])
    if found["gpu"]:
        parts += gpu_section(found["gpu"])
    return "\n".join(parts).rstrip() + "\n"


def load(name: str) -> dict[str, Any] | None:
    """Recorded results, or None."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def save(name: str, results: Mapping[str, Any]) -> None:
    """Record results, and write the page anew."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    TARGET.write_text(main_report(), encoding="utf-8")


# --------------------------------------------------------------------------- sections


def cpu_section(results: Mapping[str, Any]) -> list[str]:
    """Where, goals, how to read it, and a table a workload."""
    tables = [text for workload in results["workloads"] for text in workload_section(results, workload)]
    goals = goal_rows(results)
    reached = ["## Goals\n", table(("goal", "", "measured", ""), goals), ""] if goals else []
    return [*head(results), *reached, *tables, HOW_TO_READ, *versions(results)]


def head(results: Mapping[str, Any]) -> list[str]:
    """On what, when and how."""
    machine = results["machine"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GB of memory"
    return [
        f"{processor(machine)}, {machine['threads']} threads, {memory}; {results['created']}, commit "
        f"{results['commit']}, `{results['command']}`.\n"
    ]


def workload_section(results: Mapping[str, Any], workload: Mapping[str, Any]) -> list[str]:
    """A heading, what it is, and the table."""
    chosen = next(p for p in plan.WORKLOADS if p.name == workload["name"])
    figures = all_figures(results, workload)
    return [f"## {chosen.title}\n", f"{chosen.about} {describe(workload['facts'], chosen)}\n", speed_table(figures), ""]


def describe(facts: Mapping[str, float], chosen: plan.Plan) -> str:
    """The numbers of a workload in a sentence."""
    pairs = " (two rows a pair)" if chosen.kind == "pairs" else ""
    return (
        f"{facts['tokens_per_row']:.0f} tokens per row{pairs}, the longest {facts['longest']:.0f}, "
        f"{facts['trained_per_row']:.0f} of them trained; after sharing, {facts['computed_share']:.0%} of the tokens "
        f"are left to compute."
    )


def speed_table(figures: Sequence[Figures]) -> str:
    """One line a program."""
    pairs = any(f.pairs is not None for f in figures)
    header = [
        "program",
        "tokens/s",
        "trained/s",
        *(["pairs/s"] if pairs else []),
        "tunery is … times as fast",
        "at a time",
        "peak memory",
        "share",
        "start-up",
    ]
    return table(header, [_speed_row(f, pairs) for f in figures])


def _speed_row(f: Figures, pairs: bool) -> list[str]:
    tail = [
        "–" if f.at_once is None else str(f.at_once),
        "–" if f.peak_bytes is None else f"{f.peak_bytes / 1e9:.1f} GB",
        "–" if f.share is None else f"{f.share:.0%}",
        "–" if f.startup is None else f"{f.startup:.0f} s",
    ]
    if f.problem or f.data_tokens is None or f.trained_tokens is None:
        return [f.title, f"no speed: {f.problem}", "", *([""] if pairs else []), "", *tail]
    rate = ["–" if f.pairs is None else f"{f.pairs:.2f}"] if pairs else []
    ratio = "" if f.name == "tunery" else "–" if f.ratio is None else spread(f.ratio)
    return [f.title, f"{f.data_tokens.median:,.0f}", f"{f.trained_tokens:,.0f}", *rate, ratio, *tail]


def spread(value: Spread) -> str:
    """A ratio with its range."""
    return f"**{value.median:.1f}** ({value.low:.1f} to {value.high:.1f})"


def goal_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Each goal, what was measured, and whether that reaches it."""
    rows = []
    for workload in results["workloads"]:
        chosen = next(p for p in plan.WORKLOADS if p.name == workload["name"])
        figures = {f.name: f for f in all_figures(results, workload)}
        if nearest := _fastest_peer(figures):
            fastest, ratio = nearest
            what, goal = f"{chosen.title}: the fastest peer, {fastest.title}", chosen.speed_goal
            rows.append(_goal(what, f"≥ {goal:g} ×", ratio, goal, "{:.1f} ×"))
        dtype = next((run["dtype"] for run in _own_runs(workload) if "dtype" in run), None)
        if (share := figures["tunery"].share) is not None and (goal := chosen.share_goal.get(str(dtype))) is not None:
            what = f"{chosen.title}: share of the matmul rate in {dtype}"
            rows.append(_goal(what, f"≥ {goal:.0%}", share, goal, "{:.0%}"))
        if chosen.name == "long-text" and nearest:
            rows += _memory_goal(figures["tunery"], nearest[0])
    return rows


def _own_runs(workload: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [comparison["tunery"] for comparison in workload["comparisons"].values()]


def _fastest_peer(figures: Mapping[str, Figures]) -> tuple[Figures, float] | None:
    """The peer that comes nearest to tunery, and how many times as fast tunery is."""
    peers = [(peer, peer.ratio.median) for peer in figures.values() if peer.ratio]
    return min(peers, key=lambda pair: pair[1], default=None)


def _goal(what: str, goal: str, value: float, least: float, form: str) -> list[str]:
    return [what, goal, form.format(value), "reached" if value >= least else "missed"]


def _memory_goal(ours: Figures, fastest: Figures) -> list[list[str]]:
    if not ours.peak_bytes or not fastest.peak_bytes:
        return []
    part = ours.peak_bytes / fastest.peak_bytes
    verdict = "reached" if part <= MEMORY_GOAL else "missed"
    what = f"Long free text: peak memory against the fastest peer's, {fastest.title}"
    return [[what, f"≤ {MEMORY_GOAL:g} ×", f"{part:.2f} ×", verdict]]


def versions(results: Mapping[str, Any]) -> list[str]:
    """What each program ran on."""
    seen: dict[str, str] = {}
    for workload in results["workloads"]:
        for name, comparison in workload["comparisons"].items():
            for side, run in (("tunery", comparison["tunery"]), (name, comparison["other"])):
                if run and "versions" in run:
                    seen[side] = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    titles = {peer.name: peer.title for peer in (plan.TUNERY, *plan.PEERS)}
    return ["## Versions\n", table(("program", "versions"), [[titles[n], text] for n, text in seen.items()]), ""]


def gpu_section(results: Mapping[str, Any]) -> list[str]:
    """One line a program and shape, on a GPU."""
    machine = results["machine"]
    rows = []
    for run in results["runs"]:
        if run.get("failed"):
            rows.append([run["title"], run["shape"], f"no speed: {run['failed']}", "", "", ""])
        else:
            ratio = f"{run['ratio']:.2f}" if run.get("ratio") else ""
            memory, share = f"{run['peak_bytes'] / 1e9:.1f} GB", f"{run['share']:.0%}" if run.get("share") else "–"
            rows.append([run["title"], run["shape"], f"{run['tokens_per_second']:,.0f}", ratio, memory, share])
    header = ("program", "shape", "tokens/s", "tunery is … times as fast", "peak GPU memory", "share")
    about = (
        f"{machine['name']}; {results['created']}, commit {results['commit']}, `{results['command']}`. Random weights, "
        f"rank {plan.RANK} on all linear layers, rows of {results['length']:,} tokens, all trained, nothing shared.\n"
    )
    return ["## On a GPU\n", about, table(header, rows), ""]


def write(path: Path = TARGET) -> None:
    """Render the recorded results again."""
    path.write_text(main_report(), encoding="utf-8")
