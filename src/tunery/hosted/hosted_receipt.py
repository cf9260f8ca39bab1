"""The receipt of a hosted run: what was sent, what was asked for, what the server says it did, and what that cost."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from tunery.config import Task
from tunery.errors import HostedError
from tunery.hosted.costs import dollars
from tunery.hosted.hosted_plan import HostedPlan
from tunery.hosted.job_settings import to_yaml
from tunery.jsonl import JsonMapping, JsonObject
from tunery.openai_api.methods import FEWEST_ROWS, settled_hyperparameters
from tunery.records.hosted_state import HostedState
from tunery.records.run_receipt import HostedReceipt
from tunery.records.typed_record import RecordError
from tunery.text import plural
from tunery.training.build_receipt import head_section
from tunery.training.metrics import training_lines, validation_lines
from tunery.versions import version_of

FEW_ROWS = 50
"""Fewer rows than OpenAI advises to begin with."""


def build_receipt(plan: HostedPlan, state: HostedState, lines: Sequence[JsonMapping]) -> HostedReceipt:
    """The receipt of a run whose job has succeeded.

    Raises:
        HostedError: the server describes the job in another form than OpenAI's.

    Args:
        lines: of metrics.jsonl.
    """
    task, begun, done = plan.task, state.job.get("created_at"), state.job.get("finished_at")
    facts: JsonObject = {
        **head_section(task, to_yaml(task)),
        "model": {"name": task.model, "source": state.address},
        "data": {**plan.rows_section(), "rows_sha256": state.files},
        "tokens": {"data": state.job.get("trained_tokens"), "estimated": plan.estimate.training_tokens},
        "training": _training(task, state, lines),
        "hosted": _hosted(state, plan),
        "speed": {"total_seconds": done - begun if begun and done else None},
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in ("tunery", "openai")}},
    }
    facts["warnings"] = _warnings(plan, state, facts)
    try:
        return HostedReceipt.of(facts)
    except RecordError as error:
        raise HostedError(
            f"{state.job_id} has succeeded, but its server describes it in a form that is not OpenAI's: {error}",
            f"the model is trained: {state.tuned_model} at {state.address}",
        ) from None


def _training(task: Task, state: HostedState, lines: Sequence[JsonMapping]) -> JsonObject:
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


def _hosted(state: HostedState, plan: HostedPlan) -> JsonObject:
    job = state.job
    billed = job.get("trained_tokens")
    return {
        "address": state.address,
        "job": job.get("id"),
        "model": state.model,
        "tuned_model": job.get("fine_tuned_model"),
        "method": state.method,
        "files": {name: file.as_json() for name, file in state.uploaded.items()},
        "result_files": [str(file) for file in job.get("result_files") or ()],
        "billed_tokens": billed,
        "cost": plan.price.of_training(billed) if isinstance(billed, int) else None,
        "estimate": state.estimate,
        "earlier_jobs": [{key: earlier.get(key) for key in ("id", "status", "error")} for earlier in state.earlier],
    }


def _warnings(plan: HostedPlan, state: HostedState, receipt: JsonMapping) -> list[str]:
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
    if isinstance(billed, int) and billed and expected and not 0.75 <= billed / expected <= 1.33:
        cost = receipt["hosted"]["cost"]
        worth = "" if cost is None else f" ({dollars(cost)})"
        found.append(f"the job was billed for {billed:,} tokens{worth}, and {expected:,} were expected")
    if state.earlier:
        found.append(f"{plural(len(state.earlier), 'earlier job')} of this run did not succeed")
    return found
