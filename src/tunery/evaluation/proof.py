"""The receipt, put into checks, facts and commands for the report. Pure functions of receipt.json."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tunery.evaluation.record import NOTHING, RunRecord, as_number, items, listed, pick, show
from tunery.jsonl import JsonMapping, is_mapping
from tunery.paths import safe_name

Receipt = JsonMapping


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


def _dropped(data: object) -> object:
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


Shown = Literal["public", "place", "private"]
"""On a page that is published a fact stands as it is, or by the last part of a path or hub id, or not at all: where
things lay on the machine that trained is nobody else's business."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something the receipt says.

    Attributes:
        key: where it stands in the receipt, as "model.source".
        label: for people; nothing depends on its wording.
        value: in words; for people who may see everything.
        public: the same for everyone; None where it is private.
    """

    key: str
    label: str
    value: str
    public: str | None


def last_part(path: str) -> str:
    """The last part of a path or a hub id."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


@dataclass(frozen=True, slots=True)
class _Entry:
    label: str
    key: str
    form: str
    shown: Shown = "public"

    def fact(self, receipt: Receipt) -> Fact | None:
        """None where the receipt does not say."""
        value = pick(receipt, *self.key.split("."))
        if is_mapping(value):
            value = [f"{name} ({count:,})" for name, count in value.items()]
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        if (said := show(value, self.form)) == NOTHING:
            return None
        public = {"public": said, "place": last_part(said), "private": None}[self.shown]
        return Fact(self.key, self.label, said, public)


_FACTS: tuple[tuple[str, tuple[_Entry, ...]], ...] = (
    (
        "Data",
        (
            _Entry("Kind", "data.kind", "words"),
            _Entry("Rows read", "data.rows_read", "count"),
            _Entry("Training rows", "data.train_rows", "count"),
            _Entry("… of them seen", "training.rows_seen", "count"),
            _Entry("Validation rows", "data.validation_rows", "count"),
            _Entry("Test rows", "data.test_rows", "count"),
            _Entry("Converted (rows)", "data.converted", "words"),
            _Entry("Columns set aside (rows)", "data.columns_ignored", "words", "private"),
            _Entry("Columns not used", "data.columns_unused", "words", "private"),
            _Entry("Skipped as bad", "data.rows_skipped", "count"),
            _Entry("Dropped", "data.dropped", "count"),
            _Entry("Dropped as too long", "data.dropped_too_long", "count"),
            _Entry("Cut to length", "data.truncated", "count"),
            _Entry("Repeated rows", "data.duplicates", "count"),
            _Entry("Removed, also held out", "data.overlap_removed", "count"),
        ),
    ),
    (
        "Tokens",
        (
            _Entry("In the data seen", "tokens.data", "count"),
            _Entry("Trained", "tokens.trained", "count"),
            _Entry("In preferred answers", "preference.train.chosen_tokens", "count"),
            _Entry("In rejected answers", "preference.train.rejected_tokens", "count"),
            _Entry("Computed", "tokens.computed", "count"),
            _Entry("Predicting positions", "tokens.predicting_positions", "count"),
            _Entry("End of turn", "tokens.end_of_turn_token", "words"),
            _Entry("Template from", "template.source", "words", "place"),
        ),
    ),
    (
        "Model and adapter",
        (
            _Entry("Base", "model.name", "words", "place"),
            _Entry("From", "model.source", "words", "private"),
            _Entry("Read from a GGUF file of type", "model.file_type", "words"),
            _Entry("Architecture", "model.architecture", "words"),
            _Entry("Parameters", "model.parameters", "count"),
            _Entry("Licence", "model.license", "words"),
            _Entry("Goes on from", "lora.start.path", "words", "private"),
            _Entry("Variant", "lora.variant", "words"),
            _Entry("Rank", "lora.rank", "count"),
            _Entry("Alpha", "lora.alpha", "rate"),
            _Entry("Dropout", "lora.dropout", "rate"),
            _Entry("Targets", "lora.targets", "words"),
            _Entry("Trainable parameters", "lora.trainable_parameters", "count"),
            _Entry("Adapter file", "adapter.bytes", "bytes"),
        ),
    ),
    (
        "Server",
        (
            _Entry("Address", "hosted.address", "words"),
            _Entry("Job", "hosted.job", "words"),
            _Entry("Tuned model", "hosted.tuned_model", "words"),
            _Entry("Tokens billed", "hosted.billed_tokens", "count"),
            _Entry("Dollars, about", "hosted.cost", "points"),
            _Entry("Learning-rate multiplier", "training.learning_rate_multiplier", "rate"),
        ),
    ),
    (
        "Training",
        (
            _Entry("Steps", "training.steps", "count"),
            _Entry("Epochs", "training.epochs", "rate"),
            _Entry("Batch size", "training.batch_size", "count"),
            _Entry("Learning rate", "training.learning_rate", "rate"),
            _Entry("Beta", "preference.beta", "rate"),
            _Entry("Seed", "training.seed", "words"),
            _Entry("First loss", "training.first_loss", "loss"),
            _Entry("Final loss", "training.final_loss", "loss"),
            _Entry("Validation loss", "training.valid_loss", "loss"),
            _Entry("Best step", "training.best_step", "count"),
            _Entry("Ended", "training.stopped", "words"),
            _Entry("Went back to step", "training.restored_step", "count"),
            _Entry("Out-of-memory retries", "training.out_of_memory_retries", "count"),
            _Entry("Resumed from step", "training.resumed_from", "words"),
        ),
    ),
    (
        "Device, speed and memory",
        (
            _Entry("Device", "device.name", "words"),
            _Entry("Threads", "device.threads", "count"),
            _Entry("Processes that computed a step", "device.workers", "count"),
            _Entry("Dtype", "precision.dtype", "words"),
            _Entry("Chosen because", "precision.reason", "words"),
            _Entry("Base stored as", "model.quantization", "words"),
            _Entry("Data tokens per second", "speed.data_tokens_per_second", "count"),
            _Entry("Computed tokens per second", "speed.computed_tokens_per_second", "count"),
            _Entry("Share of measured matmul rate", "speed.matmul_share", "percent"),
            _Entry("First step after", "speed.startup_seconds", "seconds"),
            _Entry("Training took", "speed.train_seconds", "seconds"),
            _Entry("Everything took", "speed.total_seconds", "seconds"),
            _Entry("Peak memory", "memory.peak_bytes", "bytes"),
            _Entry("Memory estimated", "memory.estimated_bytes", "bytes"),
        ),
    ),
)


def facts(receipt: Receipt) -> list[tuple[str, list[Fact]]]:
    """(group, facts) of what the receipt holds; entries it lacks are left out, and so are empty groups."""
    groups = ((title, [entry.fact(receipt) for entry in entries]) for title, entries in _FACTS)
    return [(title, kept) for title, found in groups if (kept := [fact for fact in found if fact])]


def reproduction(record: RunRecord) -> dict[str, object]:
    """Commands and versions with which the run can be repeated."""
    receipt = record.receipt
    versions = [(name, str(version)) for name, version in items(pick(receipt, "versions"))]
    file = f"{safe_name(record.name)}.yaml"
    install = _install(pick(receipt, "tunery"), dict(versions))
    return {
        "commands": [*install, f"tunery check {file}", f"tunery train {file}"],
        "file": file,
        "versions": versions,
    }


def _install(tunery: object, pins: Mapping[str, str]) -> list[str]:
    """Commands that get these versions from where they lie: builds of torch from PyTorch's own index, tunery from a
    clone."""
    version, _, build = pins.get("torch", "").partition("+")
    index = f" --index-url https://download.pytorch.org/whl/{shlex.quote(build)}" if build else ""
    torch = [f"pip install {shlex.quote(f'torch=={version}')}{index}"] if version else []
    known = pins.get("transformers")
    transformers = shlex.quote(f"transformers=={known}") if known else ""
    clone = [f"{f'pip install . {transformers}'.strip()}   # in a clone of tunery {tunery}"] if tunery else []
    return [*torch, *clone]


@dataclass(frozen=True, slots=True)
class Hash:
    """The SHA-256 of something the run was made of or has made.

    Attributes:
        file: the data file that it is of, as the task names it; "" for everything else.
    """

    label: str
    digest: str
    file: str = ""


def hashes(record: RunRecord) -> list[Hash]:
    """With which everything in the run can be recognised; those that the receipt lacks are left out."""
    known = [(label, pick(record.receipt, *key.split("."))) for label, key in _HASHES]
    files = [Hash("Data", str(digest), path) for path, digest in items(pick(record.receipt, "data", "files")) if digest]
    own = [*known, ("Receipt", record.receipt_sha256)]
    return [*(Hash(label, str(digest)) for label, digest in own if digest), *files]


_HASHES = (
    ("Task", "task_sha256"),
    ("Base model", "model.sha256"),
    ("Chat template", "template.sha256"),
    ("Rows as trained", "data.rows_sha256.train"),
    ("Starting adapter", "lora.start.sha256"),
    ("Adapter", "adapter.sha256"),
)
