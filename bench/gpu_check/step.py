"""tunery's step over an 8B shape, recomputing and without compiled functions too; where the host waits; where the time
goes."""

from __future__ import annotations

import functools
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from bench.gpu_check.check import Check
from bench.gpu_check.trainer import (
    fresh_rows,
    llama_config,
    measure_host,
    measure_recomputing,
    measure_steps,
    random_llama,
    random_rows,
    trainer_of,
)
from bench.peers.with_tunery import Trainer
from tunery.fast.compile import compiling

PROFILE_ROWS = 70
"""Kernels in the table of the profile."""


def step(check: Check) -> None:
    """Batches of 4, 1 and 16 rows, with half of each row shared, and recomputing; host time, waits and a profile."""
    started = time.perf_counter()
    model = random_llama(check, check.shape("8b"))
    check.say("build", shape="8b", seconds=check.since(started))
    started = time.perf_counter()
    trainer = trainer_of(model)
    check.say(
        "adapter and inspection",
        seconds=check.since(started),
        flattened=trainer.model.flattened,
        last_layer=bool(trainer.model.last_layer),
    )
    # First of all: the first packed batch of a run that recomputes once met a kernel that had not been tried.
    recomputing = functools.partial(measure_recomputing, check, "step, recomputing", trainer)
    check.attempt("step, recomputing", functools.partial(recomputing, 2, 1))
    plain = functools.partial(measure_steps, check, "step", trainer)
    for count in (4, 1, 16):
        check.attempt("step", functools.partial(plain, fresh_rows(check, count), check.steps if count == 4 else 3))
        if count == 4:
            check.attempt("host", lambda: measure_host(check, trainer, random_rows(check, 4), "8b"))
            if check.device.type == "cuda":
                check.attempt("waits", functools.partial(_waits, check, trainer))
                check.attempt("profile", functools.partial(_profile, check, trainer))
    part, shared = "step, half of each row shared", check.length // 2
    half = fresh_rows(check, 16, shared)
    check.attempt(part, lambda: measure_steps(check, part, trainer, half, 3, shared=shared))
    check.attempt("step, recomputing", functools.partial(recomputing, 4, 3))


def _waits(check: Check, trainer: Trainer) -> None:
    """Where a step waits for the device, by PyTorch's own count."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.step(0, random_rows(check, 4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchroniz" in str(w.message)]
    check.say("waits", places=Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits))


def _profile(check: Check, trainer: Trainer) -> None:
    """Kernels of one step: a table (profile.txt) and a trace (trace.json.gz) beside the results."""
    from torch.profiler import ProfilerActivity, profile

    trainer.step(0, random_rows(check, 4))
    check.wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        trainer.step(1, random_rows(check, 4))
        check.wait()
    averages = found.key_averages()
    table = averages.table(sort_by="self_device_time_total", row_limit=PROFILE_ROWS, max_name_column_width=110)
    (check.out / "profile.txt").write_text(table, encoding="utf-8")
    found.export_chrome_trace(str(check.out / "trace.json.gz"))
    events = [event for event in found.events() or () if event.device_type.name == "CUDA"]
    busy = sum(event.time_range.elapsed_us() for event in events)
    whole = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    check.say("profile", kernels=len(events), busy_ms=round(busy / 1e3, 1), first_to_last_ms=round(whole / 1e3, 1))


def eager(check: Check) -> None:
    """The same step with no element-wise function compiled."""
    with compiling(False):
        trainer = trainer_of(random_llama(check, check.shape("8b")))
        for count in (4, 1):
            work = functools.partial(measure_steps, check, "step, eager", trainer)
            check.attempt("step, eager", functools.partial(work, fresh_rows(check, count), check.steps))


def nf4(check: Check) -> None:
    """A 70B shape in NF4, one row: activations kept, then recomputed."""
    from bench.peers.with_tunery_nf4 import random_nf4

    started = time.perf_counter()
    model = random_nf4(llama_config(check.shape("70b")), torch.bfloat16, check.device)
    trainer = trainer_of(model)
    check.say("build", shape="70b nf4", seconds=check.since(started))
    check.attempt("nf4, kept", lambda: measure_steps(check, "nf4, kept", trainer, fresh_rows(check, 1), 2))
    check.attempt("nf4, recomputing", lambda: measure_recomputing(check, "nf4, recomputing", trainer, 1, 2))
