"""tunery against its peers, in one run: prints the tables and writes docs/benchmarks.md.

    make bench                                  # everything; 44 minutes without Unsloth, on two cores with AVX512_BF16
    make bench ARGS="--only chat --peers peft"  # a part of it, printed; --save also renews it in the page
    make bench ARGS="--quick"                   # one timed step each, printed

Each peer runs in its own virtual environment (.venv-bench/), built on first use.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import plan, report
from bench.environments import EnvironmentFailed, python_of
from bench.measure import compare, together

WORK = plan.ROOT / "runs" / "bench"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [workload.name for workload in plan.WORKLOADS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar="WORKLOAD", help=f"of {', '.join(names)}")
    parser.add_argument("--peers", nargs="*", choices=plan.NAMES, metavar="PEER", help=f"of {', '.join(plan.NAMES)}")
    parser.add_argument("--quick", action="store_true", help="one timed step each instead of three")
    parser.add_argument("--save", action="store_true", help="record a part too, beside what is recorded of the others")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of each program")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the base, the rows and the logs")
    parser.add_argument("--render", action="store_true", help="only write the page again from what is recorded")
    return parser.parse_args(arguments)


def main() -> None:
    """Build, write the workloads, check losses, measure, report."""
    options = parse()
    if options.render:
        report.write()
        return
    started = time.perf_counter()
    workloads = [w for w in plan.WORKLOADS if not options.only or w.name in options.only]
    wanted = plan.NAMES if options.peers is None else tuple(options.peers)
    folder = options.work.resolve()
    steps = (1 if options.quick else plan.REPEATS) + 1
    build_environments(workloads, wanted)
    write_workloads(folder, workloads, steps)
    results = heading(options.threads)
    results["checks"] = check(folder, workloads, wanted, options.threads)
    results["workloads"] = [measure(folder, w, wanted, options.threads, steps - 1) for w in workloads]
    results["minutes"] = round((time.perf_counter() - started) / 60, 1)
    whole = not (options.only or options.quick or options.peers is not None)
    print("\n".join(report.cpu_section(results)))
    if whole or options.save:
        report.save("cpu", results if whole else merged(report.load("cpu"), results))
        say(f"recorded, and {report.TARGET.relative_to(plan.ROOT)} written; {results['minutes']} minutes")


def build_environments(workloads: Sequence[plan.Plan], wanted: tuple[str, ...]) -> None:
    """Before anything is timed. One that cannot be built is said here, and again in place of its speeds."""
    for name in dict.fromkeys(peer.environment for w in workloads for peer in plan.peers_of(w, wanted)):
        try:
            python_of(name)
        except EnvironmentFailed as error:
            say(str(error))


def write_workloads(folder: Path, workloads: Sequence[plan.Plan], steps: int, checks: bool = True) -> None:
    """In a process of its own, so that this one stays small; the rows of the float32 checks too."""
    kinds = {workload.kind for workload in workloads} if checks else set()
    names = [w.name for w in (*workloads, *(c for c in plan.CHECKS if c.kind in kinds))]
    command = [sys.executable, "-m", "bench.workloads", str(folder), *names, "--steps", str(steps)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, cwd=plan.ROOT, env=environment, check=True)


def check(folder: Path, workloads: Sequence[plan.Plan], wanted: tuple[str, ...], threads: int) -> dict[str, Any]:
    """The float32 runs: kind → peer → run."""
    found: dict[str, Any] = {}
    for chosen in plan.CHECKS:
        if chosen.kind not in {workload.kind for workload in workloads}:
            continue
        say(f"{chosen.title}: {chosen.about}")
        sides = [plan.TUNERY, *plan.peers_of(chosen, wanted)]
        place, precision = folder / chosen.name, ("--precision", "float32")
        found[chosen.kind] = {
            peer.name: together([peer], place, threads, plan.CHECK_STEPS, *precision)[0] for peer in sides
        }
    return found


def measure(folder: Path, chosen: plan.Plan, wanted: tuple[str, ...], threads: int, repeats: int) -> dict[str, Any]:
    """tunery beside each peer in turn; alone where no peer is wanted."""
    place = folder / chosen.name
    facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    comparisons = {}
    for peer in plan.peers_of(chosen, wanted) or [None]:
        say(f"{chosen.title}: tunery{f' and {peer.title}' if peer else ''}")
        comparisons[peer.name if peer else "alone"] = compare(peer, place, threads, repeats)
    return {"name": chosen.name, "facts": facts, "micro_batch": chosen.micro_batch, "comparisons": comparisons}


def merged(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """Results in which what was measured now takes the place of what was there; the heading is the new one."""
    if before is None:
        return now
    checks = {kind: {**before["checks"].get(kind, {}), **runs} for kind, runs in now["checks"].items()}
    known = {workload["name"]: workload for workload in before["workloads"]}
    for workload in now["workloads"]:
        comparisons = known.get(workload["name"], {}).get("comparisons", {})
        known[workload["name"]] = {**workload, "comparisons": {**comparisons, **workload["comparisons"]}}
    order = [known[w.name] for w in plan.WORKLOADS if w.name in known]
    return {**now, "checks": {**before["checks"], **checks}, "workloads": order}


def heading(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Where, when, and from which sources."""
    import torch

    from tunery.models.device import describe_device, has_bfloat16_instructions

    machine = {**describe_device(torch.device(device)), "threads": threads, "system": platform.platform()}
    if device == "cpu":
        machine["bfloat16_instructions"] = has_bfloat16_instructions()
    return {
        "created": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": machine,
    }


def commit() -> str:
    """The commit, marked if files have changed since."""
    try:
        said = [
            subprocess.run(["git", *words], cwd=plan.ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--", "src", "bench/*.py"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + (" with changes" if said[1] else "")


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text: str) -> None:
    """To the terminal, not into the tables."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
