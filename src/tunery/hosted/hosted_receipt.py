"""The receipt of a hosted run: what was sent, what was asked for, what the server says it did, and what that cost."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from tunery.config import Task
from tunery.hosted.curve import Line
from tunery.hosted.hosted_plan import HostedPlan
from tunery.hosted.job_settings import to_yaml
from tunery.hosted.prices import dollars
from tunery.hosted.state import HostedState
from tunery.openai_api.methods import FEWEST_ROWS
from tunery.records.run_receipt import HostedReceipt
from tunery.text import plural
from tunery.training.build_receipt import head_section, read_section
from tunery.training.metrics import training_lines, validation_lines
from tunery.versions import version_of

FEW_ROWS = 50
"""Fewer rows than OpenAI advises to begin with."""


def build_receipt(plan: HostedPlan, state: HostedState, lines: Sequence[Line]) -> HostedReceipt:
    """The receipt of a run whose job has succeeded.

    Args:
        lines: of metrics.jsonl.
    """
    task = plan.task
    facts: dict[str, Any] = {
        **head_section(task, to_yaml(task)),
        "model": {"name": task.model, "source": state.address},
        "data": {
            **read_section(plan.data, plan.prompts.instruction),
            "train_rows": len(plan.data.train),
            "validation_rows": len(plan.data.validation),
            "test_rows": len(plan.data.test),
            "dropped": 0,
            "dropped_rows": [],
            "truncated": len(plan.too_long),
            "truncated_rows": plan.too_long[:100],
            "rows_sha256": state.files,
        },
        "tokens": {"data": state.job.get("trained_tokens"), "estimated": plan.estimate.training_tokens},
        "training": _training(task, state, lines),
        "hosted": _hosted(state, plan),
        "speed": _speed(state),
        "versions": versions(),
    }
    facts["warnings"] = _warnings(plan, state, facts)
    return HostedReceipt.of(facts)


def versions() -> dict[str, str]:
    """Of Python and of what talked to the server."""
    names = ("tunery", "openai")
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}


def _training(task: Task, state: HostedState, lines: Sequence[Line]) -> dict[str, Any]:
    losses, validations = training_lines(lines), validation_lines(lines)
    best = min(validations, key=lambda pair: pair[1], default=None)
    settled = settled_hyperparameters(state.job)
    steps = losses[-1][0] if losses else None
    return {
        "steps": steps,
        "planned_steps": steps,
        "epochs": settled.get("n_epochs"),
        "batch_size": settled.get("batch_size"),
        "learning_rate_multiplier": settled.get("learning_rate_multiplier"),
        "seed": state.job.get("seed", task.seed),
        "first_loss": losses[0][1] if losses else None,
        "final_loss": losses[-1][1] if losses else None,
        "valid_loss": validations[-1][1] if validations else None,
        "best_step": best[0] if best else None,
        "best_valid_loss": best[1] if best else None,
        "stopped": "finished",
    }


def settled_hyperparameters(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the server settled on: in `method` where it fills that in, else in `hyperparameters`."""
    method = job.get("method") or {}
    asked = ((method.get(method.get("type")) or {}).get("hyperparameters")) or {}
    settled = job.get("hyperparameters") or {}
    names = {**settled, **asked}
    return {
        name: next((value for value in (asked.get(name), settled.get(name)) if value not in (None, "auto")), None)
        for name in names
    }


def _hosted(state: HostedState, plan: HostedPlan) -> dict[str, Any]:
    job = state.job
    billed = job.get("trained_tokens")
    return {
        "address": state.address,
        "job": job.get("id"),
        "model": state.model,
        "tuned_model": job.get("fine_tuned_model"),
        "method": state.method,
        "files": state.uploaded,
        "result_files": job.get("result_files"),
        "billed_tokens": billed,
        "cost": None if billed is None else plan.price.of_training(billed),
        "estimate": state.estimate,
        "earlier_jobs": [{key: earlier.get(key) for key in ("id", "status", "error")} for earlier in state.earlier],
    }


def _speed(state: HostedState) -> dict[str, Any]:
    job = state.job
    begun, done = job.get("created_at"), job.get("finished_at")
    return {"total_seconds": done - begun if begun and done else None}


def _warnings(plan: HostedPlan, state: HostedState, receipt: Mapping[str, Any]) -> list[str]:
    found = list(plan.remarks)
    data = receipt["data"]
    if data["rows_skipped"]:
        found.append(f"{data['rows_skipped']:,} bad rows were skipped")
    if data["truncated"]:
        found.append(f"{data['truncated']:,} rows are longer than OpenAI trains, and were probably cut there")
    if data["duplicates"]:
        found.append(f"{data['duplicates']:,} training rows repeat an earlier one")
    if FEWEST_ROWS <= data["train_rows"] < FEW_ROWS:
        found.append(f"{data['train_rows']} training rows are few; OpenAI advises at least {FEW_ROWS}")
    billed, expected = receipt["hosted"]["billed_tokens"], receipt["tokens"]["estimated"]
    if billed and expected and not 0.75 <= billed / expected <= 1.33:
        cost = receipt["hosted"]["cost"]
        worth = "" if cost is None else f" ({dollars(cost)})"
        found.append(f"the job was billed for {billed:,} tokens{worth}, and {expected:,} were expected")
    if state.earlier:
        found.append(f"{plural(len(state.earlier), 'earlier job')} of this run came to nothing")
    return found
