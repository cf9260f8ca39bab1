"""Everything about a task that can be known before any compute: `tunery check`."""

from __future__ import annotations

import numpy as np

from tunery.config import Task
from tunery.data.example import DataSet
from tunery.data.prepare import Prepared, pieces
from tunery.lora.attach import base_parameters, trainable_parameters
from tunery.models.device import available_memory, pick_device, resolve_dtype
from tunery.models.gguf import few_bits
from tunery.models.load import check_vocabulary, empty_model, quantization_of
from tunery.models.model_source import locate
from tunery.models.quantized import expected_bytes
from tunery.records.check_report import VERSION, CheckReport, PlannedTrainingSection, SampleSide, TrainedLengthsSection
from tunery.records.run_receipt import DataSection
from tunery.training.build_receipt import data_section, end_of_turn
from tunery.training.held_out import split_remarks
from tunery.training.plan import make_objective, peak_rate, total_steps
from tunery.training.rehearsal import estimate_time, mean_flops, rough_time
from tunery.training.sizing import Need, largest, sampled
from tunery.training.start import Attached, attach_adapter

BINS = 10


def check(task: Task, prepared: Prepared, samples: int = 3, *, timed: bool = True) -> CheckReport:
    """What would be trained, in numbers and in a few rows, with an estimate of memory and time.

    Args:
        samples: training rows (or pairs) to show.
        timed: some steps of a part of the model may be computed, for the estimate of time.

    Raises:
        ModelError: the model cannot be found, or its tokenizer has tokens that it has no embedding for.
        TargetError: `lora.targets` matches nothing in it.
    """
    notes: list[str] = []
    training = _planned(task, prepared, notes, timed=timed)
    shown = prepared.train.first(samples)
    places = [prepared.data.train[row.example].where for row in shown]
    sides: list[SampleSide | None] = [_SIDES[row.desirable] for row in shown]
    return CheckReport(
        version=VERSION,
        name=task.name,
        notes=prepared.data.notes,
        data=DataSection.of(data_section(prepared)),
        tokens=_lengths(prepared),
        labels=label_counts(prepared.data),
        training=training,
        remarks=[*prepared.renderer.remarks.sentences(), *split_remarks(prepared.data), *notes],
        samples=[pieces(prepared.renderer, row) for row in shown],
        sample_names=[f"{place}, {side}" if side else place for place, side in zip(places, sides, strict=True)],
        sample_sides=sides,
        sample_lines=[place.line for place in places],
    )


def _lengths(prepared: Prepared) -> TrainedLengthsSection:
    rows = prepared.train.rows
    lengths = np.asarray([len(row.ids) for row in rows])
    trained = sum(row.trained for row in rows)
    return TrainedLengthsSection(
        all=int(lengths.sum()),
        trained=trained,
        trained_share=trained / int(lengths.sum()),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        histogram=histogram(lengths),
        **end_of_turn(prepared),
    )


_SIDES: dict[bool | None, SampleSide | None] = {True: "chosen", False: "rejected", None: None}
"""Row.desirable → what a sample is called."""


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """How many rows have how many tokens."""
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(low, high + 1, BINS + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    return [
        {"from": int(a), "to": int(b) - 1, "rows": int(n)}
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def label_counts(data: DataSet) -> dict[str, dict[str, int]]:
    """label → split → number of rows."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        label: {name: sum(example.label == label for example in split) for name, split in splits.items()}
        for label in data.labels
    }


def _planned(task: Task, prepared: Prepared, notes: list[str], *, timed: bool) -> PlannedTrainingSection:
    """What would be trained; what a person should know of base and starting adapter goes to `notes`."""
    train = prepared.train
    objective = make_objective(task, prepared.data.kind, train)
    device = pick_device(task.train.device)
    dtype, _ = resolve_dtype(task.train.precision, device)
    model = empty_model(task.model)
    stored = quantization_of(task.model, model.config, task.train.quantize)
    base_bytes = expected_bytes(model, stored, dtype.itemsize)
    check_vocabulary(task.model, prepared.renderer.tokenizer, model)
    attached = attach_adapter(task, model, reference=objective.has_reference)
    notes += _remarks(task, attached)
    trainable = sum(tensor.numel() for tensor in trainable_parameters(model))
    need = Need.of(task, train, model, base_bytes=base_bytes, dtype_bytes=dtype.itemsize, device=device)
    steps, batches = total_steps(task.train, train.units), sampled(task, train)
    flops = steps * mean_flops(model, batches, objective)
    if timed:
        time = estimate_time(flops, task, prepared, model.config, dtype, device)
    else:
        time = rough_time(flops, dtype, device)
    return PlannedTrainingSection(
        model=task.model,
        parameters=sum(p.numel() for p in base_parameters(model)),
        layers=len(attached.matched),
        trainable_parameters=trainable,
        steps=steps,
        batch_size=task.train.batch_size,
        unit=objective.noun,
        learning_rate=peak_rate(task.train, model.config, objective),
        precision=str(dtype).removeprefix("torch."),
        quantization=stored,
        device=device.type,
        computed_share=largest(batches)[0] / largest(sampled(task, train, share=False))[0],
        memory_bytes=need.estimate(need.tokens, task.train.gradient_checkpointing is True).total,
        available_bytes=available_memory(device),
        flops=flops,
        seconds=time.likely,
        seconds_low=time.low,
        seconds_high=time.high,
        seconds_basis=time.basis,
    )


def _remarks(task: Task, attached: Attached) -> list[str]:
    """What the run would say about the base, and about the adapter it starts from."""
    base = few_bits(task.model, locate(task.model, weights=False).file_type)
    start = attached.start.remark(task.model) if attached.start else None
    return [*(remark for remark in (base, start) if remark), *attached.notes]
