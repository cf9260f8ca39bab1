"""The run to be exported: its base, adapter, tokenizer, and the rows on which an export is compared with the adapter;
without a model in memory where possible."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import yaml
from torch import nn

from tunery.config import BUILT_IN_MODELS, Task
from tunery.data.example import Example, Place
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import Kind
from tunery.data.prepare import Rows, tokenize, tokenize_once
from tunery.data.read import read_data
from tunery.data.render import Renderer
from tunery.errors import AdapterError, ConfigError, TuneryError
from tunery.evaluation.record import RunRecord, pick
from tunery.evaluation.tuned import read_local_receipt, require_same_base, same_renderer
from tunery.export.token_scores import Probe, make_probe
from tunery.export.weights import BaseWeights, FileWeights, MergedWeights, ModelWeights
from tunery.jsonl import JsonMapping
from tunery.lora.adapter import WEIGHTS_FILE, read_adapter
from tunery.lora.layer import LoRATensors
from tunery.lora.targets import plain_modules
from tunery.models.device import available_memory, pick_device
from tunery.models.load import empty_model, load_base, load_tokenizer, quantization_of
from tunery.models.model_source import ModelSource, locate
from tunery.models.quantized import expected_bytes
from tunery.paths import RunPaths, file_sha256
from tunery.records.run_receipt import Receipt
from tunery.task_file import load_task
from tunery.text import gigabytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    layers: PreTrainedModel = field(repr=False)
    pieces: Mapping[str, LoRATensors] = field(repr=False)
    weights: MergedWeights = field(repr=False)
    numbers: str
    quantized: str | None = None
    held: PreTrainedModel | None = field(default=None, repr=False)
    public: bool = False

    @property
    def config(self) -> PreTrainedConfig:
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
        numbers = _dtype(base)
    weights = MergedWeights(base, layers, pieces)
    return Subject(paths, task, receipt, source, tokenizer, renderer, layers, pieces, weights, numbers, quantized, held)


def _require_same_adapter(paths: RunPaths, receipt: Receipt) -> None:
    file = paths.adapter / WEIGHTS_FILE
    if file.is_file() and file_sha256(file) != receipt.adapter.sha256:
        raise AdapterError(
            f"{file} is not the adapter that {paths.root} was trained to (it has another hash than in the receipt)",
            "restore it, or train again",
        )


def _dtype(base: FileWeights) -> str:
    """The format in which most of the base's numbers are stored."""
    sizes: Counter[str] = Counter()
    for name in base.names():
        dtype = base.dtype(name)
        if dtype is not None and dtype.is_floating_point:
            sizes[str(dtype).removeprefix("torch.")] += math.prod(base.shape(name))
    return sizes.most_common(1)[0][0]


# --------------------------------------------------------------------------- room in memory


def place_with_room(device: str, needed: int) -> str:
    """Where a model of `needed` bytes goes: to the device asked for; under "auto" to the CPU, if a GPU has no room.

    Raises:
        ConfigError: there is no such device, or no room.
    """
    try:
        place = pick_device(device)
    except ConfigError as error:  # in the words of a task file
        raise ConfigError(error.message.removeprefix("train.device: "), "use --device auto") from None
    if device == "auto" and needed > available_memory(place):
        place = torch.device("cpu")
    if needed > (free := available_memory(place)):
        raise ConfigError(
            f"a model of {gigabytes(needed)} is to be compared, and {gigabytes(free)} are free on {place}",
            "close other programs" + ("" if place.type == "cpu" else ", or use --device cpu"),
        )
    return str(place)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a GPU whose memory runs out into words.

    Raises:
        ConfigError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the GPU's memory ran out while the export was made; nothing of it is kept",
            "use --device cpu, or close other programs on the GPU",
        ) from error


# --------------------------------------------------------------------------- what the Hub calls its base

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
"""OWNER/NAME."""


def hub_id(record: RunRecord) -> str | None:
    """The base model's id on the Hub, or None if it came from a folder or file."""
    task = task_of(record)
    source = str(pick(record.receipt, "model", "source") or "").partition("@")[0]  # a revision stands after it
    for value in (source, pick(record.receipt, "model", "name"), pick(task, "model")):
        if not isinstance(value, str):
            continue
        value = BUILT_IN_MODELS.get(value, value)
        # a relative folder may look like owner/name: it exists here
        if HUB_ID.fullmatch(value) and not value.endswith(".gguf") and not Path(value).exists():
            return value
    return None


def task_of(record: RunRecord) -> JsonMapping:
    """The run's task as written down; {} if it cannot be read."""
    try:
        task = yaml.safe_load(record.task_yaml)
    except yaml.YAMLError:
        return {}
    return task if isinstance(task, dict) else {}


# --------------------------------------------------------------------------- the rows compared

TEXTS = (
    "Hello, world!",
    "The quick brown fox jumps over 12 lazy dogs; it's 3.14159, isn't it?",
    "  two spaces,\ttabs\tand lines\n\n\n1. first\n2. second\n\n   indented",
    "def f(x: int) -> str:\n    return f\"{x:>8}\" if x != 0 else 'none'  # a comment\n",
    "Zażółć gęślą jaźń. Größe, naïve façade, señor, Привет, 你好，世界。 こんにちは",
    "emoji 🙂👩‍💻 and signs ≤ ± € § © … “quoted” — dash",
    "I'LL SAY WE'VE DON'T they'd you're 2024-11-30 1,234,567.89 100% #1 a_b C++",
    'https://example.org/path?q=1&r=%20#top <b>bold</b> {"key": [1, 2, null]}',
)
"""Texts that every tokenizer of an export must cut as the run's does, whatever the rows are."""

_ASKED = (
    "What is the capital of France?",
    "Write one sentence about the sea in winter.",
    "Is 17 a prime number? Answer with yes or no.",
    "Summarise in three words: the meeting was moved from Monday to Friday at 10:30.",
)
_ANSWERED = ("The capital is Paris.", "Grey waves break on an empty shore.", "yes", "Meeting moved to Friday.")


@dataclass(frozen=True)
class Prompt:
    """A question as the run puts it to the model.

    Attributes:
        messages, tools: as the chat template gets them; empty where the rows are plain text.
        text: rendered.
        ids: its tokens, as in training.
    """

    messages: tuple[JsonMapping, ...]
    tools: tuple[JsonMapping, ...]
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """What two models are compared on.

    Attributes:
        origin: "validation", "test" or "fixed texts".
        prompts: of the same rows.
        texts: each with its tokens, without any that a tokenizer puts around a text.
        note: why the rows are not held-out ones, or "".
    """

    origin: str
    probes: tuple[Probe, ...]
    prompts: tuple[Prompt, ...]
    texts: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False)
    note: str = ""


def draw_sample(subject: Subject, rows: int) -> Sample:
    """Up to `rows` held-out rows of the run, evenly chosen; where there are none, fixed texts put in the same way."""
    renderer = subject.renderer
    origin, examples, tokenized, note = _held_out(subject)
    if not tokenized.rows:
        origin, examples = "fixed texts", _fixed(subject.kind, renderer)
        tokenized = tokenize(renderer, examples, subject.limit, "cut")
    numbers = np.unique(np.linspace(0, tokenized.units - 1, min(rows, tokenized.units)).round().astype(int))
    chosen = [tokenized.rows[number * tokenized.unit] for number in numbers]
    probes = [make_probe(row.ids.tolist(), np.flatnonzero(row.weights).tolist(), row.where) for row in chosen]
    whole = {row.where for row in chosen} - set(tokenized.truncated)
    asked = [examples[row.example] for row in chosen if row.where in whole] or _fixed(subject.kind, renderer)
    texts = tuple((text, tuple(renderer.encode_prompt(text))) for text in TEXTS)
    return Sample(origin, tuple(probes), tuple(_prompt(renderer, example) for example in asked), texts, note)


def _held_out(subject: Subject) -> tuple[str, Sequence[Example], Rows, str]:
    """The run's held-out rows as far as they can still be read."""
    task = subject.task
    try:
        data = read_data(task.data, task.seed)
        origin, examples = data.held_out
        tokenized = tokenize_once(subject.renderer, examples, subject.limit, task.data.too_long)
    except TuneryError as error:
        why = "" if subject.public else f" ({error.message})"  # it may name a folder of this machine
        note = f"the run's data cannot be read any more, so fixed texts are compared{why}"
        return "", (), Rows(), note
    note = "" if tokenized.rows else "the run has no held-out rows, so fixed texts are compared"
    return origin, examples, tokenized, note


def _fixed(kind: Kind, renderer: Renderer) -> list[Example]:
    """Rows of the run's kind that do not depend on its data."""
    labels = renderer.labels
    answers = [labels[i % len(labels)] for i in range(len(_ASKED))] if kind.labelled else _ANSWERED
    pairs = zip(_ASKED, answers, strict=True)
    return [kind.make(Place("text", number), asked, answer) for number, (asked, answer) in enumerate(pairs, start=1)]


def _prompt(renderer: Renderer, example: Example) -> Prompt:
    kind = KINDS[example.kind]
    if not kind.templated:
        text = example.prompt or example.text
        return Prompt((), (), text, tuple(renderer.encode_prompt(text, begin=True)))
    messages = kind.question(renderer, example)
    text = renderer.prompt(messages, example.tools)
    plain = tuple(renderer.plain(messages))
    return Prompt(plain, tuple(example.tools), text, tuple(renderer.encode_prompt(text)))
