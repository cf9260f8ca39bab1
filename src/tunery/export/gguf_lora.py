"""The adapter alone as llama.cpp reads it: for each layer NAME.weight the tensors NAME.weight.lora_a [rank, in] and
NAME.weight.lora_b [out, rank], and one alpha; llama.cpp adds alpha / rank · B A x. An embedding's A is stored as
[vocabulary, rank], because rows of it are looked up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from tunery.errors import ConfigError
from tunery.export.gguf_model import EMBEDDING, describe_run, writer
from tunery.export.gguf_names import Place, architecture_of, place_tensors
from tunery.export.gguf_types import encode
from tunery.export.subject import Subject
from tunery.lora.layer import LoRATensors

NUMBERS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
"""Number formats of an adapter file."""


def check_numbers(name: str) -> None:
    """Refuse a number format that no adapter file has.

    Raises:
        ConfigError: with those that there are.
    """
    if name.lower() not in NUMBERS:
        raise ConfigError(f"an adapter is not written as {name}", f"its number formats are {', '.join(NUMBERS)}")


def write_adapter(subject: Subject, file: Path, numbers: str) -> None:
    """Write the adapter.

    Args:
        numbers: of NUMBERS.

    Raises:
        ConfigError: llama.cpp cannot apply it; see `adapter_refusal`.
    """
    if reason := adapter_refusal(subject):
        raise ConfigError(f"llama.cpp cannot apply this adapter: {reason}", "use --to gguf, where it is merged")
    architecture = architecture_of(subject.config)
    kind = NUMBERS[numbers]
    alpha = _usual_alpha(subject.pieces)
    with writer(file, architecture.name) as out:
        out.add_type(gguf.GGUFType.ADAPTER)
        describe_run(out, subject)
        out.add_string(gguf.Keys.Adapter.TYPE, "lora")
        out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        tensors: list[np.ndarray] = []
        for place, piece in placed_pieces(subject):
            for letter, tensor in zip("ab", pair(place, piece, alpha), strict=True):
                name, data = f"{place.name}.lora_{letter}", encode(tensor, kind)
                out.add_tensor_info(name, tensor.shape, np.dtype(np.float32), data.nbytes, kind)
                tensors.append(data)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_ti_data_to_file()
        for data in tensors:
            out.write_tensor_data(data)


def adapter_refusal(subject: Subject) -> str | None:
    """Why llama.cpp cannot apply an adapter beside its base, or None.

    It knows a tied head and embedding as one tensor, so an update of one would be applied to both.
    """
    if subject.weights.untied:
        return "it changes the embedding or the head, which are one tensor in a GGUF file of this base"
    return None


def placed_pieces(subject: Subject) -> list[tuple[Place, LoRATensors]]:
    """The adapter's parts with the tensors they belong to, in model order."""
    names = [f"{path}.weight" for path in subject.pieces]
    places = place_tensors(architecture_of(subject.config), subject.config, names)
    return [(places[name], piece) for name, piece in zip(names, subject.pieces.values(), strict=True)]


def pair(place: Place, piece: LoRATensors, alpha: float) -> tuple[np.ndarray, np.ndarray]:
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
