"""What a neighbour costs: steps of training, and answers of `tunery serve`, beside other programs that compute.

    make bench-neighbour                              # everything, 15 minutes on two cores
    make bench-neighbour ARGS="--only torch-low --spin 300000 2000"   # other OpenMP spin counts, printed

Steps alone and beside each neighbour take turns, so that both meet the same drift of the machine. Writes the section
"Beside other programs" of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import plan, report
from bench.measure import Process
from bench.neighbours import NEIGHBOURS, STEPS, Neighbour
from bench.run import WORK, heading, say, usable_cores, write_workloads

WORKLOAD = "classification-16"
_ENDS_WITH_US = """\
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
"""


@contextlib.contextmanager
def running(neighbour: Neighbour, threads: int) -> Iterator[None]:
    """The neighbour computes within this context, in the session of this process: across sessions Linux gives each an
    equal part of the processor, whatever its priority (sched(7), autogroups)."""
    command = ["nice", "-n", str(neighbour.niceness), sys.executable, "-c"]
    process = subprocess.Popen(
        [*command, _ENDS_WITH_US + neighbour.program.format(threads=threads)], stdin=subprocess.PIPE
    )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # until torch is imported
            raise SystemExit(f"the neighbour ended with code {process.returncode}")
        yield
    finally:
        process.kill()
        process.wait()


def steps_beside(neighbour: Neighbour | None, process: Process, threads: int) -> list[dict[str, float]]:
    """Seconds and computed tokens of STEPS steps."""
    with running(neighbour, threads) if neighbour else contextlib.nullcontext():
        lines = [process.step() for _ in range(STEPS)]
    return [{name: line[name] for name in ("seconds", "computed_tokens")} for line in lines]


def measure(
    folder: Path, neighbours: Sequence[Neighbour], spins: Sequence[str | None], threads: int
) -> list[dict[str, Any]]:
    """For each spin count (None: tunery's own) and neighbour: seconds of the steps alone, before, and beside it."""
    found = []
    for spin in spins:
        process = Process(plan.TUNERY, folder, threads, environment={} if spin is None else {"GOMP_SPINCOUNT": spin})
        try:
            process.ready()
            process.step()
            for neighbour in neighbours:
                alone = steps_beside(None, process, threads)
                beside = steps_beside(neighbour, process, threads)
                found.append({"spin": spin, "neighbour": neighbour.name, "alone": alone, "beside": beside})
                before, after = (statistics.mean(step["seconds"] for step in steps) for steps in (alone, beside))
                say(
                    f"  spin count {spin or 'as set by tunery'}, {neighbour.title}: {after:.2f} s a step beside it, "
                    f"{before:.2f} alone"
                )
        finally:
            process.stop()
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [neighbour.name for neighbour in NEIGHBOURS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*names, "serve"], default=[*names, "serve"])
    parser.add_argument("--spin", nargs="+", default=[None], metavar="COUNT", help="GOMP_SPINCOUNT of tunery's process")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the base, the rows and the logs")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, and record if it is everything."""
    options = parse()
    folder = options.work.resolve()
    workload = next(w for w in plan.WORKLOADS if w.name == WORKLOAD)
    neighbours = [n for n in NEIGHBOURS if n.name in options.only]
    results: dict[str, Any] = heading(options.threads) | {"steps": [], "serve": None}
    if neighbours:
        count = len(neighbours) * 2 * STEPS + 1
        write_workloads(folder, [workload], count, checks=False)
        results["steps"] = measure(folder / WORKLOAD, neighbours, options.spin, options.threads)
    if "serve" in options.only:
        from bench.neighbour_serve import measure_serving

        results["serve"] = measure_serving(folder / "neighbour-serve")
    from bench.neighbour_report import neighbour_section

    print("\n".join(neighbour_section(results)))
    if len(neighbours) == len(NEIGHBOURS) and results["serve"] and options.spin == [None]:
        report.save("neighbour", results)


if __name__ == "__main__":
    main()
