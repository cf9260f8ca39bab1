"""What programs would have said: records as bench.measure makes them."""

from __future__ import annotations

from typing import Any


def run(seconds: list[float], losses: list[float], **changes: Any) -> dict[str, Any]:
    """A run whose steps took so long; 1,000 tokens and 100 trained ones a step."""
    steps = [
        {"step": n, "seconds": s, "loss": loss, "data_tokens": 1000, "trained_tokens": 100, "peak_bytes": 4_000_000_000}
        for n, (s, loss) in enumerate(zip(seconds, losses, strict=True))
    ]
    return {"steps": steps, "startup_seconds": 7.0, "trainable": 5, "versions": {"torch": "2.13.0"}, **changes}


def ours(seconds: list[float], losses: list[float]) -> dict[str, Any]:
    """The same of tunery, with the rate it measured beside each step."""
    made = run(seconds, losses)
    for step in made["steps"]:
        step |= {"computed_tokens": 400, "matmul_rate": 1e9, "flops": 6e8, "plain_flops": 1.5e9, "peak_bytes": 10**9}
    return made


CURVE = [2.0, 1.8, 1.7, 1.6]


def results(**peers: dict[str, Any]) -> dict[str, Any]:
    """Of the long-text workload; each peer's run beside one of tunery's."""
    name = {key: key.replace("_", "-") for key in peers}
    check = {"tunery": run([1, 1], [3.0, 2.5]), **{name[key]: run([1, 1], [3.0, 2.5]) for key in peers}}
    return {
        "created": "2026-11-24",
        "commit": "abc",
        "command": "python -m bench.run",
        "machine": {"name": "A processor", "threads": 2, "memory_bytes": 24 * 2**30},
        "checks": {"rows": check},
        "workloads": [
            {
                "name": "long-text",
                "micro_batch": {"peft": 4},
                "facts": {
                    "rows": 32,
                    "tokens_per_row": 258.0,
                    "trained_per_row": 257.0,
                    "longest": 512,
                    "computed_share": 0.99,
                },
                "comparisons": {
                    name[key]: {"tunery": ours([9, 1, 2, 1], CURVE), "other": other} for key, other in peers.items()
                },
            }
        ],
    }
