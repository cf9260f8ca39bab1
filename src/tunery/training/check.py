"""Everything about a task that can be known before any compute: `tunery check`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from tunery.config import Task
from tunery.data.batching import Row
from tunery.data.example import DataSet
from tunery.data.prepare import Prepared
from tunery.lora.attach import trainable_parameters
from tunery.models.device import available_memory, matmul_rate, pick_device, resolve_dtype
from tunery.models.flops import step_flops
from tunery.models.load import empty_model, quantization_of
from tunery.models.memory import Lean, estimate, logit_chunk
from tunery.models.quantized import expected_bytes
from tunery.training.fit import attach_adapter
from tunery.training.plan import make_objective, peak_rate, total_steps
from tunery.training.receipt import data_section, end_of_turn
from tunery.training.sizing import kept_keys, largest_batch, wanted_rows

REACHED_SHARE = 0.3
"""Share of the matrix-multiply rate that a time estimate counts on (docs/lab.md)."""

BINS = 10


def check(task: Task, prepared: Prepared, samples: int = 3) -> dict[str, Any]:
    """What would be trained, in numbers and in a few rows, with an estimate of memory and time.

    Returns:
        JSON values; "samples" holds rows as [[text, is_trained], …] pieces, and "sample_names" the place of each in
        the data; of a pair of answers both rows are there, the chosen one first.

    Raises:
        ConfigError: the model cannot be found, or `lora.targets` matches nothing in it.
    """
    rows = prepared.train.rows
    lengths = np.asarray([len(row.ids) for row in rows])
    trained = sum(row.trained for row in rows)
    return {
        "name": task.name,
        "notes": prepared.data.notes,
        "data": data_section(prepared),
        "tokens": {
            "all": int(lengths.sum()),
            "trained": trained,
            "trained_share": trained / int(lengths.sum()),
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "longest": int(lengths.max()),
            "histogram": histogram(lengths),
            **end_of_turn(prepared),
        },
        "labels": label_counts(prepared.data),
        "training": _estimates(task, prepared),
        "remarks": prepared.renderer.remarks.sentences(),
        "samples": [_pieces(prepared, row) for row in prepared.train.first(samples)],
        "sample_names": sample_names(prepared, samples),
    }


def sample_names(prepared: Prepared, samples: int) -> list[str]:
    """Where each sample comes from, and which answer of a pair it is."""
    sides = (", chosen", ", rejected") if prepared.train.unit == 2 else ("",)
    rows = prepared.train.first(samples)
    return [f"{row.where}{sides[number % len(sides)]}" for number, row in enumerate(rows)]


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


def _estimates(task: Task, prepared: Prepared) -> dict[str, Any]:
    train, rows = prepared.train, prepared.train.rows
    objective = make_objective(task, prepared.data.kind)
    device = pick_device(task.train.device)
    dtype, _ = resolve_dtype(task.train.precision, device)
    model = empty_model(task.model)
    stored = quantization_of(task.model, model.config, task.train.quantize)
    base_bytes = expected_bytes(model, stored, dtype.itemsize)
    matched, _ = attach_adapter(task, model)
    trainable = sum(tensor.numel() for tensor in trainable_parameters(model))
    parameters = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    tokens, positions = largest_batch(task, train)
    steps = total_steps(task.train, train.units)
    memory = estimate(
        model.config.get_text_config(),
        parameters=parameters,
        trainable=trainable,
        dtype_bytes=dtype.itemsize,
        tokens_in_flight=-(-tokens * wanted_rows(task) // task.train.batch_size),
        trained_tokens=positions,
        gradient_checkpointing=task.train.gradient_checkpointing is True,
        keys=kept_keys(rows, device),
        logit_chunk=logit_chunk(device.type),
        base_bytes=base_bytes,
        lean=Lean.of(model),
    )
    flops = steps * step_flops(model, tokens, positions, trainable, objective.passes)
    seconds = flops / (REACHED_SHARE * matmul_rate(device, dtype))
    alone, _ = largest_batch(task, train, share=False)
    return {
        "model": task.model,
        "parameters": parameters,
        "layers": len(matched),
        "trainable_parameters": trainable,
        "steps": steps,
        "batch_size": task.train.batch_size,
        "unit": objective.noun,
        "learning_rate": peak_rate(task.train, model.config, objective),
        "precision": str(dtype).removeprefix("torch."),
        "quantization": stored,
        "device": device.type,
        "computed_share": tokens / alone,
        "memory_bytes": memory.total,
        "available_bytes": available_memory(device),
        "seconds": seconds,
    }


def _pieces(prepared: Prepared, row: Row) -> list[tuple[str, bool]]:
    """A row's text in stretches of trained and untrained tokens."""
    on = row.weights > 0
    borders = [0, *(np.flatnonzero(np.diff(on)) + 1).tolist(), len(on)]
    return [
        (str(prepared.renderer.tokenizer.decode(row.ids[a:b].tolist())), bool(on[a]))
        for a, b in itertools.pairwise(borders)
    ]
