"""The run to be exported: its base, adapter, tokenizer and held-out rows, without a model in memory where possible."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunery.config import Task
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import Kind
from tunery.data.render import Renderer
from tunery.errors import AdapterError
from tunery.evaluation.tuned import read_local_receipt, require_same_base, same_renderer
from tunery.export.room import place_with_room
from tunery.export.weights import BaseWeights, FileWeights, MergedWeights, ModelWeights
from tunery.lora.adapter import WEIGHTS_FILE, read_adapter
from tunery.lora.layer import LoRATensors
from tunery.lora.targets import plain_modules
from tunery.models.load import empty_model, load_base, load_tokenizer, quantization_of
from tunery.models.model_source import ModelSource, locate
from tunery.models.quantized import expected_bytes
from tunery.paths import RunPaths, file_sha256
from tunery.records.run_receipt import Receipt
from tunery.task_file import load_task


@dataclass
class Subject:
    """A finished run, opened to be exported.

    Attributes:
        source: where the base lies.
        layers: the base's modules without memory for their weights.
        pieces: the adapter, by full module name.
        weights: base and adapter together.
        numbers: the base's dtype ("bfloat16"); of a quantised base, that of its products.
        quantized: how the run held its base ("nf4", "int8"), or None.
        held: the quantised base in memory; None for others, which are loaded when they are needed.
        public: others will see the export, so no path of this machine goes into it.
    """

    paths: RunPaths
    task: Task
    receipt: Receipt = field(repr=False)
    source: ModelSource
    tokenizer: Any
    renderer: Renderer
    layers: Any = field(repr=False)
    pieces: Mapping[str, LoRATensors] = field(repr=False)
    weights: MergedWeights = field(repr=False)
    numbers: str
    quantized: str | None = None
    held: Any = field(default=None, repr=False)
    public: bool = False

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.layers.config

    @property
    def kind(self) -> Kind:
        """Of the run's rows."""
        return KINDS[self.receipt.data.kind]

    @property
    def limit(self) -> int:
        """The longest row of the run, in tokens."""
        return self.receipt.data.limit

    @property
    def base_name(self) -> str:
        """What the run calls its base; of one on this machine only the last part, if others will see it."""
        name = self.task.model
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if self.public and Path(name).exists() else name

    def module(self, path: str) -> nn.Module:
        """A layer of the base, without memory for its weights."""
        return self.layers.get_submodule(path)


def open_run(run: str | Path, device: str = "auto") -> Subject:
    """Open a run directory for export.

    Args:
        device: where a quantised base is put; others are not loaded here.

    Raises:
        ConfigError: no finished run there, or its base cannot be found.
        AdapterError: base, chat template or adapter are not those of the training.
    """
    paths = RunPaths(Path(run))
    receipt, task = read_local_receipt(paths), load_task(paths.task)
    source = locate(task.model)
    require_same_base(paths, task, receipt, source.sha256())
    tokenizer = load_tokenizer(task.model)
    renderer = same_renderer(paths, task, receipt, tokenizer)
    layers = empty_model(task.model)
    _require_same_adapter(paths, receipt)
    pieces = read_adapter(dict(plain_modules(layers)), paths.adapter)
    quantized = quantization_of(task.model, layers.config, task.train.quantize)
    held = None
    base: BaseWeights
    if quantized:
        precision = receipt.precision.dtype
        needed = expected_bytes(layers, quantized, getattr(torch, precision).itemsize)
        place = place_with_room(device, needed)
        held = load_base(task.model, precision=precision, device=place, quantize=task.train.quantize).model
        base, numbers = ModelWeights(held), precision
    else:
        base = FileWeights(source, layers)
        numbers = _number_format(base)
    weights = MergedWeights(base, layers, pieces)
    return Subject(paths, task, receipt, source, tokenizer, renderer, layers, pieces, weights, numbers, quantized, held)


def _require_same_adapter(paths: RunPaths, receipt: Receipt) -> None:
    file = paths.adapter / WEIGHTS_FILE
    if file.is_file() and file_sha256(file) != receipt.adapter.sha256:
        raise AdapterError(
            f"{file} is not the adapter that {paths.root} was trained to (it has another hash than in the receipt)",
            "restore it, or train again",
        )


def _number_format(base: FileWeights) -> str:
    """The format in which most of the base's numbers are stored."""
    sizes: Counter[str] = Counter()
    for name in base.names():
        dtype = base.dtype(name)
        if dtype is not None and dtype.is_floating_point:
            sizes[str(dtype).removeprefix("torch.")] += math.prod(base.shape(name))
    return sizes.most_common(1)[0][0]
