"""The merged model in one GGUF file, tokenizer and chat template inside, written tensor by tensor.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from tunery.errors import ConfigError
from tunery.export.gguf_names import Architecture, TensorPlace, architecture_of, place_tensors, rope_divisors
from tunery.export.gguf_tokenizer import write_tokenizer
from tunery.export.gguf_types import Numbers, bytes_of, encode
from tunery.export.subject import Subject
from tunery.export.weights import MergedWeights

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
DIVISORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: the model's own name for it, its place, shape [out, in] and type."""

    source: str
    place: TensorPlace
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return bytes_of(self.shape, self.kind)


def write_model(subject: Subject, file: Path, numbers: Numbers, weights: MergedWeights | None = None) -> None:
    """Write a GGUF file.

    Args:
        weights: what to write instead of base and adapter together (the base alone, to put an adapter on).

    Raises:
        ConfigError: llama.cpp does not compute such a model, or has no name for its tokenizer.
    """
    weights = weights or subject.weights
    architecture = architecture_of(subject.config)
    entries = plan(architecture, subject.config, weights, numbers)
    with writer(file, architecture.name) as out:
        _describe(out, subject, numbers)
        architecture.settings(out, subject.config)
        write_tokenizer(out, subject.renderer, weights.shape(_embedding(entries))[0], templated=subject.kind.templated)
        divisors = rope_divisors(subject.config)
        if divisors is not None:
            out.add_tensor_info(DIVISORS, divisors.shape, divisors.dtype, divisors.nbytes)
        for entry in entries:
            out.add_tensor_info(entry.place.name, entry.shape, np.dtype(np.float32), entry.size, entry.kind)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_ti_data_to_file()
        if divisors is not None:
            out.write_tensor_data(divisors)
        for entry in entries:
            out.write_tensor_data(_encoded(weights, entry))


@contextlib.contextmanager
def writer(file: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """A writer whose file is closed at the end; it says nothing."""
    log = logging.getLogger("gguf.gguf_writer")
    level = log.level
    log.setLevel(logging.ERROR)
    out = gguf.GGUFWriter(file, architecture)
    try:
        yield out
    finally:
        out.close()
        log.setLevel(level)


def plan(architecture: Architecture, config: Any, weights: MergedWeights, numbers: Numbers) -> list[Entry]:
    """The tensors of the file in order.

    Raises:
        ConfigError: a tensor has no place; or the head is not tied to the embedding, in an architecture where it is.
    """
    names = [name for name in weights.names() if weights.untied or name != weights.head]
    places = place_tensors(architecture, config, names)
    if not architecture.head and any(place.name == HEAD for place in places.values()):
        raise ConfigError(
            f"llama.cpp ties embedding and head of {architecture.name} models, and this adapter changed one of them",
            "use --to merged; or train without embed_tokens and lm_head in lora.targets",
        )
    output = HEAD if any(place.name == HEAD for place in places.values()) else EMBEDDING
    entries = []
    for name, place in places.items():
        shape = weights.shape(name)[::-1] if place.flipped else weights.shape(name)
        kind = numbers.type_of(place.name, shape, config.num_hidden_layers, output)
        entries.append(Entry(name, place, shape, kind))
    return entries


def _embedding(entries: list[Entry]) -> str:
    return next(entry.source for entry in entries if entry.place.name == EMBEDDING)


def _describe(out: gguf.GGUFWriter, subject: Subject, numbers: Numbers) -> None:
    out.add_type(gguf.GGUFType.MODEL)
    describe_run(out, subject)
    out.add_file_type(int(numbers.file_type))
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)


def describe_run(out: gguf.GGUFWriter, subject: Subject) -> None:
    """Name, licence and base, as far as the run knows them; no path of this machine."""
    from tunery.evaluation.record import read_run
    from tunery.export.hub_name import hub_id

    model: Mapping[str, Any] = subject.receipt["model"]
    out.add_name(subject.task.name)
    if model.get("license"):
        out.add_license(str(model["license"]))
    if base := hub_id(read_run(subject.paths.root)):
        owner, name = base.split("/")
        out.add_base_model_count(1)
        out.add_base_model_name(0, name)
        out.add_base_model_organization(0, owner)
        out.add_base_model_repo_url(0, f"https://huggingface.co/{base}")


def stored(weights: MergedWeights, entry: Entry, rows: slice | None = None) -> np.ndarray:
    """A tensor's numbers as they are to be stored, float32 [out, in]; of one stored plainly, some of its rows."""
    return _arranged(weights.wide(entry.source, rows), entry.place)


def _arranged(tensor: Tensor, place: TensorPlace) -> np.ndarray:
    numbers = tensor.float().numpy()
    if place.flipped:
        numbers = numbers.T
    if place.order is not None:
        numbers = numbers[place.order]
    return numbers + np.float32(1) if place.plus_one else numbers


def _encoded(weights: MergedWeights, entry: Entry) -> np.ndarray:
    """The bytes of a tensor; one whose rows keep their order is made slice by slice."""
    if not entry.place.plain or len(entry.shape) < 2:
        return encode(stored(weights, entry), entry.kind)
    out = np.empty((entry.shape[0], entry.size // entry.shape[0]), dtype=np.uint8)
    for rows in weights.slices(entry.source):
        out[rows] = encode(stored(weights, entry, rows), entry.kind)
    return out
