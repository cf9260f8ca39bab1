"""GGUF files, written tensor by tensor: the merged model, tokenizer and chat template inside, or the adapter alone.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from torch import Tensor

from tunery.errors import ConfigError
from tunery.evaluation.record import read_run
from tunery.export.gguf_names import Architecture, TensorPlace, architecture_of, place_tensors, rope_divisors
from tunery.export.gguf_tokenizer import write_tokenizer
from tunery.export.gguf_types import Numbers, bytes_of, encode
from tunery.export.subject import Subject, hub_id
from tunery.export.weights import MergedWeights
from tunery.lora.layer import LoRATensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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


def plan(architecture: Architecture, config: PreTrainedConfig, weights: MergedWeights, numbers: Numbers) -> list[Entry]:
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
    bases = None
    if base := hub_id(read_run(subject.paths.root)):
        owner, name = base.split("/")
        bases = [{"name": name, "organization": owner, "repo_url": f"https://huggingface.co/{base}"}]
    licence = subject.receipt.model.license or None
    gguf.Metadata(name=subject.task.name, license=licence, base_models=bases).set_gguf_meta_model(out)


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


# --------------------------------------------------------------------------- adapter

ADAPTER_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
"""Dtypes of an adapter file."""


def check_numbers(name: str) -> None:
    """Refuse a dtype that no adapter file has.

    Raises:
        ConfigError: with those that there are.
    """
    if name.lower() not in ADAPTER_TYPES:
        raise ConfigError(f"an adapter is not written as {name}", f"its dtypes are {', '.join(ADAPTER_TYPES)}")


def write_adapter(subject: Subject, file: Path, numbers: str) -> None:
    """Write the adapter as llama.cpp reads it: for each layer NAME.weight the tensors NAME.weight.lora_a [rank, in]
    and NAME.weight.lora_b [out, rank], and one alpha; llama.cpp adds alpha / rank · B A x. An embedding's A is stored
    as [vocabulary, rank], because rows of it are looked up.

    Args:
        numbers: of ADAPTER_TYPES.

    Raises:
        ConfigError: llama.cpp cannot apply it; see `adapter_refusal`.
    """
    if reason := adapter_refusal(subject):
        raise ConfigError(f"llama.cpp cannot apply this adapter: {reason}", "use --to gguf, where it is merged")
    architecture = architecture_of(subject.config)
    kind = ADAPTER_TYPES[numbers]
    alpha = _usual_alpha(subject.pieces)
    with writer(file, architecture.name) as out:
        out.add_type(gguf.GGUFType.ADAPTER)
        describe_run(out, subject)
        out.add_string(gguf.Keys.Adapter.TYPE, "lora")
        out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for place, piece in placed_pieces(subject):
            for letter, tensor in zip("ab", pair(place, piece, alpha), strict=True):
                out.add_tensor(f"{place.name}.lora_{letter}", encode(tensor, kind), raw_dtype=kind)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()


def adapter_refusal(subject: Subject) -> str | None:
    """Why llama.cpp cannot apply an adapter beside its base, or None.

    It knows a tied head and embedding as one tensor, so an update of one would be applied to both.
    """
    if subject.weights.untied:
        return "it changes the embedding or the head, which are one tensor in a GGUF file of this base"
    return None


def placed_pieces(subject: Subject) -> list[tuple[TensorPlace, LoRATensors]]:
    """The adapter's parts with the tensors they belong to, in model order."""
    names = [f"{path}.weight" for path in subject.pieces]
    places = place_tensors(architecture_of(subject.config), subject.config, names)
    return [(places[name], piece) for name, piece in zip(names, subject.pieces.values(), strict=True)]


def pair(place: TensorPlace, piece: LoRATensors, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B as they are stored, float32. What alpha / rank does not say of the scaling goes into B."""
    A, B = piece.A.float().numpy(), piece.B.float().numpy()
    factor = piece.settings.scaling * piece.settings.rank / alpha
    if abs(factor - 1) > 1e-6:
        B = B * np.float32(factor)
    if place.order is not None:
        B = B[place.order]
    if place.name == EMBEDDING:
        A = A.T
    return np.ascontiguousarray(A), np.ascontiguousarray(B)


def _usual_alpha(pieces: Mapping[str, LoRATensors]) -> float:
    return Counter(piece.settings.alpha for piece in pieces.values()).most_common(1)[0][0]
