"""The receipt, put into checks, facts and commands for the report. Pure functions of receipt.json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunery.evaluation.record import NOTHING, RunRecord, as_number, items, listed, pick, show
from tunery.paths import safe_name

Receipt = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Check:
    """Something the receipt proves. `ok` is None where the receipt does not say."""

    ok: bool | None
    title: str
    detail: str


def checks(receipt: Receipt) -> list[Check]:
    """Whether the run trained what it should: end token, tensors, reload, and rows lost."""
    if not receipt:
        return []
    if pick(receipt, "hosted"):
        return [_sent(receipt), _billed(receipt), _rows(receipt)]
    return [_end_of_turn(receipt), _moved(receipt), _reload(receipt), _rows(receipt)]


def _sent(receipt: Receipt) -> Check:
    files = items(pick(receipt, "hosted", "files"))
    told = ", ".join(f"{name} as {pick(file, 'id')} ({show(pick(file, 'bytes'), 'bytes')})" for name, file in files)
    if not files:
        return Check(None, "Files sent", "The receipt does not say what was sent.")
    return Check(True, "What was checked is what was sent", f"Sent whole: {told}.")


def _billed(receipt: Receipt) -> Check:
    billed = as_number(pick(receipt, "hosted", "billed_tokens"))
    expected = as_number(pick(receipt, "tokens", "estimated"))
    if not billed or not expected:
        return Check(None, "Tokens billed", "The server does not say how many tokens it trained.")
    told = f"The server trained {billed:,.0f} tokens; {expected:,.0f} were expected."
    near = 0.75 <= billed / expected <= 1.33
    return Check(near, "The job trained as much as expected" if near else "The job trained another amount", told)


def _end_of_turn(receipt: Receipt) -> Check:
    trained, token = pick(receipt, "tokens", "end_of_turn_trained"), pick(receipt, "tokens", "end_of_turn_token")
    named = f" ({token})" if token else ""
    if trained is None:
        return Check(None, "End of the answer", "The receipt does not say whether the end token was trained.")
    if trained:
        return Check(True, "The model learns to stop", f"The end-of-turn token{named} was among the trained tokens.")
    return Check(
        False, "The end token was not trained", f"The model may not know when to stop: no end-of-turn token{named}."
    )


def _moved(receipt: Receipt) -> Check:
    rows = tensor_rows(receipt)
    if not rows:
        return Check(None, "Adapter tensors", "The receipt lists no adapter tensors.")
    still = [row.name for row in rows if not row.moved]
    if still:
        return Check(
            False, "Some tensors never moved", f"{len(still)} of {len(rows)} did not move, such as {still[0]}."
        )
    least = min(row.moved or 0.0 for row in rows)
    return Check(
        True, "Every tensor was trained", f"All {len(rows):,} adapter tensors moved; the least by {least:.2g}."
    )


def _reload(receipt: Receipt) -> Check:
    ok, difference = pick(receipt, "reload", "ok"), as_number(pick(receipt, "reload", "difference"))
    if ok is None:
        return Check(None, "Saved adapter", "The receipt does not say whether the saved adapter was read back.")
    rows = show(pick(receipt, "reload", "rows"), "count")
    apart = NOTHING if difference is None else f"{difference:.1e}" if difference else "0"
    detail = f"Read back from disk, it gives the same loss on {rows} rows (difference {apart})."
    if ok:
        return Check(True, "What was saved is what was trained", detail)
    return Check(False, "The saved adapter differs", f"Read back from disk, its loss on {rows} rows is off by {apart}.")


def _rows(receipt: Receipt) -> Check:
    data = pick(receipt, "data")
    lost = {
        "skipped": as_number(pick(data, "rows_skipped")),
        "dropped": as_number(_dropped(data)),
        "cut": as_number(pick(data, "truncated")),
    }
    read = show(pick(data, "rows_read"), "count")
    if all(count is None for count in lost.values()):
        return Check(None, "Rows", "The receipt does not say whether rows were lost.")
    if not any(lost.values()):
        return Check(True, "No row was lost", f"All {read} rows read were used whole.")
    told = ", ".join(f"{count:,.0f} {what}" for what, count in lost.items() if count)
    return Check(False, "Not every row was used whole", f"Of {read} rows read: {told}.")


def _dropped(data: Any) -> Any:
    return next((value for key in ("dropped", "dropped_too_long") if (value := pick(data, key)) is not None), None)


def warnings_of(receipt: Receipt) -> list[str]:
    """The receipt's warnings, as text."""
    return [str(warning) for warning in listed(pick(receipt, "warnings"))]


@dataclass(frozen=True, slots=True)
class TensorRow:
    """An adapter tensor: its shape in words, and how far it moved relative to its start (None: not known)."""

    name: str
    shape: str
    moved: float | None


def tensor_rows(receipt: Receipt) -> list[TensorRow]:
    """Every adapter tensor of the receipt."""
    return [
        TensorRow(name, " × ".join(map(str, listed(pick(tensor, "shape")))), as_number(pick(tensor, "moved")))
        for name, tensor in items(pick(receipt, "lora", "tensors"))
    ]


_FACTS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Data",
        (
            ("Kind", "data.kind", "words"),
            ("Rows read", "data.rows_read", "count"),
            ("Training rows", "data.train_rows", "count"),
            ("Validation rows", "data.validation_rows", "count"),
            ("Test rows", "data.test_rows", "count"),
            ("Skipped as bad", "data.rows_skipped", "count"),
            ("Dropped", "data.dropped", "count"),
            ("Dropped as too long", "data.dropped_too_long", "count"),
            ("Cut to length", "data.truncated", "count"),
            ("Repeated rows", "data.duplicates", "count"),
            ("Removed, also held out", "data.overlap_removed", "count"),
        ),
    ),
    (
        "Tokens",
        (
            ("In the data seen", "tokens.data", "count"),
            ("Trained", "tokens.trained", "count"),
            ("In preferred answers", "preference.train.chosen_tokens", "count"),
            ("In rejected answers", "preference.train.rejected_tokens", "count"),
            ("Computed", "tokens.computed", "count"),
            ("Predicting positions", "tokens.predicting_positions", "count"),
            ("End of turn", "tokens.end_of_turn_token", "words"),
            ("Template from", "template.source", "words"),
        ),
    ),
    (
        "Model and adapter",
        (
            ("Base", "model.name", "words"),
            ("From", "model.source", "words"),
            ("Architecture", "model.architecture", "words"),
            ("Parameters", "model.parameters", "count"),
            ("Licence", "model.license", "words"),
            ("Goes on from", "lora.start.path", "words"),
            ("Rank", "lora.rank", "count"),
            ("Alpha", "lora.alpha", "rate"),
            ("Dropout", "lora.dropout", "rate"),
            ("Targets", "lora.targets", "words"),
            ("Trainable parameters", "lora.trainable_parameters", "count"),
            ("Adapter file", "adapter.bytes", "bytes"),
        ),
    ),
    (
        "Server",
        (
            ("Address", "hosted.address", "words"),
            ("Job", "hosted.job", "words"),
            ("Tuned model", "hosted.tuned_model", "words"),
            ("Tokens billed", "hosted.billed_tokens", "count"),
            ("Dollars, about", "hosted.cost", "points"),
            ("Learning-rate multiplier", "training.learning_rate_multiplier", "rate"),
        ),
    ),
    (
        "Training",
        (
            ("Steps", "training.steps", "count"),
            ("Epochs", "training.epochs", "rate"),
            ("Batch size", "training.batch_size", "count"),
            ("Learning rate", "training.learning_rate", "rate"),
            ("Beta", "preference.beta", "rate"),
            ("Seed", "training.seed", "words"),
            ("First loss", "training.first_loss", "loss"),
            ("Final loss", "training.final_loss", "loss"),
            ("Validation loss", "training.valid_loss", "loss"),
            ("Best step", "training.best_step", "count"),
            ("Ended", "training.stopped", "words"),
            ("Went back to step", "training.restored_step", "count"),
            ("Out-of-memory retries", "training.out_of_memory_retries", "count"),
            ("Resumed from step", "training.resumed_from", "words"),
        ),
    ),
    (
        "Device, speed and memory",
        (
            ("Device", "device.name", "words"),
            ("Threads", "device.threads", "count"),
            ("Processes that computed a step", "device.workers", "count"),
            ("Number format", "precision.dtype", "words"),
            ("Chosen because", "precision.reason", "words"),
            ("Base stored as", "model.quantization", "words"),
            ("Data tokens a second", "speed.data_tokens_per_second", "count"),
            ("Computed tokens a second", "speed.computed_tokens_per_second", "count"),
            ("Share of measured matmul rate", "speed.matmul_share", "percent"),
            ("First step after", "speed.startup_seconds", "seconds"),
            ("Training took", "speed.train_seconds", "seconds"),
            ("Everything took", "speed.total_seconds", "seconds"),
            ("Peak memory", "memory.peak_bytes", "bytes"),
            ("Memory estimated", "memory.estimated_bytes", "bytes"),
        ),
    ),
)


def facts(receipt: Receipt) -> list[tuple[str, list[tuple[str, str]]]]:
    """(group, [(what, value)]) of what the receipt holds; entries it lacks are left out, and so are empty groups."""
    groups = []
    for title, entries in _FACTS:
        rows = []
        for label, path, form in entries:
            value = pick(receipt, *path.split("."))
            if isinstance(value, list | tuple):
                value = ", ".join(map(str, value))
            if (shown := show(value, form)) != NOTHING:
                rows.append((label, shown))
        if rows:
            groups.append((title, rows))
    return groups


def reproduction(record: RunRecord) -> dict[str, Any]:
    """Commands, versions and hashes with which the run can be repeated and recognised."""
    receipt = record.receipt
    versions = [(name, str(version)) for name, version in items(pick(receipt, "versions"))]
    pins = {"tunery": pick(receipt, "tunery"), **dict(versions)}
    wanted = [f"{name}=={pins[name]}" for name in ("tunery", "torch", "transformers") if pins.get(name)]
    file = f"{safe_name(record.name)}.yaml"
    hashes = [
        ("Task", pick(receipt, "task_sha256")),
        ("Base model", pick(receipt, "model", "sha256")),
        ("Chat template", pick(receipt, "template", "sha256")),
        ("Rows as trained", pick(receipt, "data", "rows_sha256", "train")),
        ("Starting adapter", pick(receipt, "lora", "start", "sha256")),
        ("Adapter", pick(receipt, "adapter", "sha256")),
        ("Receipt", record.receipt_sha256),
        *((f"Data: {path}", digest) for path, digest in items(pick(receipt, "data", "files"))),
    ]
    install = [f"pip install {' '.join(map(shlex.quote, wanted))}"] if wanted else []
    return {
        "commands": [*install, f"tunery check {file}", f"tunery train {file}"],
        "file": file,
        "versions": versions,
        "hashes": [(name, str(digest)) for name, digest in hashes if digest],
    }
