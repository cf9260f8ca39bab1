"""The receipt: what was trained, on what, by which numbers, and whether the adapter on disk does the same."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from tunery.config import Task
from tunery.data.example import DataSet
from tunery.data.kinds import KINDS
from tunery.data.prepare import Prepared
from tunery.errors import AdapterError
from tunery.fast.attention_gpu import refusals
from tunery.fast.packed_model import PackedModel
from tunery.jsonl import JsonMapping, JsonObject
from tunery.lora.adapter import load_adapter, usual_settings
from tunery.lora.attach import remove, set_active
from tunery.lora.targets import untouched_linear_weights
from tunery.models.device import describe_device, peak_memory
from tunery.models.load import Base
from tunery.models.typed import norm
from tunery.paths import file_sha256, text_sha256
from tunery.records.run_receipt import (
    VERSION,
    AdapterSection,
    MemorySection,
    PrecisionSection,
    Receipt,
    ReloadSection,
    SpeedSection,
)
from tunery.text import plural
from tunery.training.held_out import split_remarks
from tunery.training.loop import Loop
from tunery.training.objectives.base import Objective
from tunery.training.scoring import Scorer
from tunery.training.start import Attached
from tunery.training.throughput import matmul_fraction, training_flops
from tunery.versions import version_of

LISTED = 100
"""Places listed by name in the receipt; beyond that only the count."""

RELOAD_ROWS = 16
RELOAD_TOLERANCE = 1e-6
"""Relative difference allowed between the loss in memory and the loss of the adapter read back from disk."""


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    names = ("tunery", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}


def movement(initial: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, JsonObject]:
    """How far each tensor moved: the norm of its change, over the norm it started with (over 1 if that was zero)."""
    moved: dict[str, JsonObject] = {}
    for name, start in initial.items():
        change = float(norm(now[name].detach().cpu() - start))
        size = float(norm(start))
        moved[name] = {"shape": list(start.shape), "moved": change / (size if size > 0 else 1.0)}
    return moved


def still_tensors(tensors: Mapping[str, JsonMapping]) -> list[str]:
    """Names of tensors that did not move at all."""
    return [name for name, tensor in tensors.items() if tensor["moved"] == 0.0]


def check_reload(model: PackedModel, objective: Objective, prepared: Prepared, folder: Path) -> ReloadSection:
    """Load the adapter just saved beside the trained one and compare their losses on the same rows.

    Raises:
        AdapterError: they differ, so what lies on disk is not what was trained.
    """
    _, _, held_out = prepared.held_out
    rows = (held_out if held_out.rows else prepared.train).first(RELOAD_ROWS)
    score = Scorer(model)
    in_memory, _ = objective.measure(score, rows)
    load_adapter(model.model, folder, name="reloaded")
    set_active(model.model, "reloaded")
    try:
        from_disk, _ = objective.measure(score, rows)
    finally:
        set_active(model.model, "default")
        remove(model.model, "reloaded")
    difference = abs(from_disk - in_memory)
    if not difference <= RELOAD_TOLERANCE * max(1.0, abs(in_memory)):
        raise AdapterError(
            f"the saved adapter gives a loss of {from_disk:.6f}, the trained one {in_memory:.6f}",
            f"{folder} is not what was trained; the last checkpoint is sound: run the same command again",
        )
    return ReloadSection(
        rows=len(rows) // objective.unit,
        loss_in_memory=in_memory,
        loss_from_disk=from_disk,
        difference=difference,
        ok=True,
    )


def read_section(data: DataSet, instruction: str) -> JsonObject:
    """What was read, and what of it was left out."""
    return {
        "files": data.files,
        "kind": data.kind,
        "columns": data.columns,
        "labels": list(data.labels),
        "instruction": instruction if KINDS[data.kind].labelled else None,
        "rows_read": data.rows_read,
        "rows_skipped": len(data.skipped),
        "skipped": [str(problem) for problem in data.skipped[:LISTED]],
        "converted": data.converted,
        "columns_ignored": data.columns_ignored,
        "columns_unused": data.columns_unused,
        "duplicates": data.duplicates,
        "overlap_removed": data.overlap_removed,
    }


def data_section(prepared: Prepared) -> JsonObject:
    """What was read, left out and cut, and the hash of what was trained."""
    splits = prepared.splits
    dropped = [{"where": where, "reason": reason} for rows in splits.values() for where, reason in rows.dropped]
    truncated = [where for rows in splits.values() for where in rows.truncated]
    return {
        **read_section(prepared.data, prepared.renderer.instruction),
        **{f"{name}_rows": rows.units for name, rows in splits.items()},
        "dropped": len(dropped),
        "dropped_rows": dropped[:LISTED],
        "truncated": len(truncated),
        "truncated_rows": truncated[:LISTED],
        "max_length": prepared.max_length,
        "rows_sha256": {name: rows.sha256() for name, rows in splits.items()},
    }


def end_of_turn(prepared: Prepared) -> JsonObject:
    """Which token ends an answer, and whether it was among the trained ones."""
    renderer = prepared.renderer
    templated = KINDS[prepared.data.kind].templated
    token = renderer.end_of_turn if templated else renderer.tokenizer.eos_token_id
    trained = token is not None and any(
        bool((row.weights[row.ids == token] > 0).any()) for row in prepared.train.rows[:1000]
    )
    name = None if token is None else renderer.tokenizer.convert_ids_to_tokens(int(token))  # type: ignore[arg-type]
    return {"end_of_turn_token": name, "end_of_turn_trained": trained}


def _warnings(prepared: Prepared, receipt: JsonMapping) -> list[str]:
    """Everything a person should know before trusting the adapter, in words."""
    data, tokens = receipt["data"], receipt["tokens"]
    found = [*prepared.renderer.remarks.sentences(), *split_remarks(prepared.data)]
    seen, rows = receipt["training"]["rows_seen"], data["train_rows"]
    if seen < rows:
        found.append(f"training ended after {seen:,} of the {plural(rows, receipt['training']['unit'])} had been seen")
    if not tokens["end_of_turn_trained"]:
        found.append("no end-of-turn token was trained: the model may not know when to stop")
    if data["rows_skipped"]:
        found.append(f"{data['rows_skipped']:,} bad rows were skipped")
    if aside := {name: count for name, count in data["columns_ignored"].items() if count}:
        listed = ", ".join(f"{name} ({plural(count, 'row')})" for name, count in aside.items())
        found.append(f"columns that hold something were set aside, as the task says: {listed}")
    if data["dropped"]:
        found.append(f"{data['dropped']:,} rows were dropped: {data['dropped_rows'][0]['reason']}, among other reasons")
    if data["truncated"]:
        found.append(f"{data['truncated']:,} rows were cut to {data['max_length']:,} tokens")
    if data["duplicates"] and prepared.data.train:
        found.append(f"{data['duplicates']:,} training rows repeat an earlier one")
    if still := still_tensors(receipt["lora"]["tensors"]):
        found.append(f"{len(still)} adapter tensors did not move: {', '.join(still[:3])}")
    found += refusals()
    if start := receipt["lora"]["start"]:
        found += [start["remark"]] if start["remark"] else []
    if receipt["lora"]["unmatched"] and receipt["lora"]["targets"] == "all-linear":
        found.append(
            f"{len(receipt['lora']['unmatched'])} weight matrices of the decoder layers were left as they are: "
            f"{', '.join(receipt['lora']['unmatched'][:3])}"
        )
    return found


def build_receipt(
    task: Task,
    prepared: Prepared,
    base: Base,
    loop: Loop,
    initial: Mapping[str, Tensor],
    attached: Attached,
    expected_bytes: int,
    folder: Path,
) -> Receipt:
    """The receipt of a run whose adapter has just been saved in `folder`.

    Args:
        initial: the adapter's tensors as they were before the first step.
        attached: where it stands, and what it started from.
        expected_bytes: the peak of memory that was expected.

    Raises:
        AdapterError: the saved adapter is not the trained one, or no tensor moved.
    """
    state, info, device = loop.state, base.info, base.model.device
    about = ("name", "source", "sha256", "architecture", "parameters", "dtype", "quantization", "license", "file_type")
    facts: JsonObject = {
        **head_section(task, task.to_yaml()),
        "model": {key: getattr(info, key) for key in about},
        "template": {
            "sha256": prepared.renderer.template_sha256,
            "source": info.template_source,
            "date": None if prepared.renderer.date is None else str(prepared.renderer.date),
        },
        "data": data_section(prepared),
        "tokens": {
            "data": state.data_tokens,
            "trained": state.trained_tokens,
            "computed": state.computed_tokens,
            "predicting_positions": state.positions,
            **end_of_turn(prepared),
        },
        "lora": _lora_section(task, base, loop, initial, attached),
        "training": _training_section(task, loop),
        **loop.plan.objective.receipt_section(prepared.splits),
        "reload": check_reload(loop.model, loop.plan.objective, prepared, folder),
        "adapter": _adapter_section(folder),
        "device": {**describe_device(device), "workers": state.cpu_workers or 1},
        "precision": _precision_section(base),
        "speed": _speed_section(loop),
        "memory": MemorySection(
            peak_bytes=peak_memory(device) + (loop.workers.pool.peak_bytes if loop.workers else 0),
            estimated_bytes=expected_bytes,
        ),
        "versions": versions(),
    }
    facts["warnings"] = [*_warnings(prepared, facts), *attached.notes]
    if len(still_tensors(facts["lora"]["tensors"])) == len(initial):
        raise AdapterError("no adapter tensor moved: nothing was trained", "raise train.learning_rate")
    return Receipt.of(facts)


def head_section(task: Task, task_yaml: str) -> JsonObject:
    """Which task, as it is written down, by which version, when (UTC)."""
    return {
        "version": VERSION,
        "tunery": version_of("tunery"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": task.name,
        "task_sha256": text_sha256(task_yaml),
    }


def _adapter_section(folder: Path) -> AdapterSection:
    """Hash and size of the adapter file."""
    file = folder / "adapter_model.safetensors"
    return AdapterSection(sha256=file_sha256(file), bytes=file.stat().st_size)


def _lora_section(task: Task, base: Base, loop: Loop, initial: Mapping[str, Tensor], attached: Attached) -> JsonObject:
    settings, start = usual_settings(base.model), attached.start
    return {
        "start": None if start is None else {**asdict(start), "remark": start.remark(base.info.name)},
        "rank": settings.rank,
        "alpha": settings.alpha,
        "scaling": settings.scaling,
        "rank_stabilized": settings.rank_stabilized,
        "variant": settings.variant,
        "dropout": settings.dropout,
        "targets": task.lora.targets if start is None else None,
        "matched": attached.matched,
        "unmatched": untouched_linear_weights(base.model),
        "trainable_parameters": sum(tensor.numel() for tensor in initial.values()),
        "tensors": movement(initial, loop.adapter),
    }


def _training_section(task: Task, loop: Loop) -> JsonObject:
    state, plan = loop.state, loop.plan
    return {
        "steps": state.step,
        "planned_steps": plan.total_steps,
        "epochs": state.step / plan.steps_per_epoch,
        "objective": plan.objective.name,
        "unit": plan.objective.noun,
        "batch_size": task.train.batch_size,
        "rows_seen": min(len(loop.train) // plan.objective.unit, state.step * task.train.batch_size),
        "learning_rate": plan.peak,
        "scheduler": task.train.scheduler,
        "seed": task.seed,
        "first_loss": state.first_loss,
        "final_loss": state.last_loss,
        "valid_loss": state.valid_loss,
        "best_step": state.best_step,
        "best_valid_loss": state.best_loss,
        "stopped": loop.stopped,
        "restored_step": loop.restored_step,
        "out_of_memory_retries": state.halvings,
        "micro_batch_rows": loop.limit.rows,
        "micro_batch_tokens": loop.limit.tokens,
        "recomputed_activations": loop.limit.recomputing,
        "compiled": loop.compiled,
        "flattened": loop.model.flattened,
        "resumed_from": list(state.resumed_from),
    }


def _precision_section(base: Base) -> PrecisionSection:
    if base.probe is None:
        return PrecisionSection(dtype=base.info.dtype, reason="as set")
    return PrecisionSection(
        dtype=base.info.dtype,
        reason=base.probe.reason,
        float32_gflops=base.probe.float32_gflops,
        bfloat16_gflops=base.probe.bfloat16_gflops,
    )


def _speed_section(loop: Loop) -> SpeedSection:
    """Start-up, validation and checkpoints are not counted."""
    state = loop.state
    seconds = max(state.seconds, 1e-9)
    flops = training_flops(loop.model, state, loop.plan.objective.passes)
    fraction, rate = matmul_fraction(loop.model, flops / seconds)
    return SpeedSection(
        data_tokens_per_second=state.data_tokens / seconds,
        computed_tokens_per_second=state.computed_tokens / seconds,
        matmul_flops_per_second=rate,
        matmul_share=fraction,
        train_seconds=round(state.seconds, 2),
    )
