"""The base with the adapter in it, as safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tunery.errors import AdapterError
from tunery.export.targets.base import LIMITS, Limits, Remark, Target
from tunery.jsonl import JsonObject
from tunery.paths import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunery.export.destinations import Wanted
    from tunery.export.subject import Sample, Subject
    from tunery.export.token_scores import TokenScores
    from tunery.export.updates import Kept
    from tunery.export.verify import Verdict
    from tunery.export.weights import MergedWeights


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

LARGEST_FILE = 5_000_000_000
"""Bytes in a file, where the base's own files give no split (it is quantised)."""

_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "license*", "notice*")
"""Files that must travel with a copy of the weights."""


class Merged(Target):
    """A folder that transformers, vLLM and any other server loads as a model."""

    name = "merged"
    about = "the base with the adapter in it, as safetensors, for transformers, vLLM and any other server"
    runtime = "transformers"
    files = (
        "config.json",
        "generation_config.json",
        SINGLE,
        "model-*.safetensors",
        INDEX,
    )
    hub_library = "transformers"
    holds_base = True

    def remarks(self, wanted: Wanted) -> list[Remark]:
        if not wanted.lost:
            return []
        message = (
            f"the base's files do not hold {wanted.lost[0]} under that name, so the adapter cannot be merged into "
            "them: merge in memory instead, with tunery.merge(model).save_pretrained(FOLDER)"
        )
        return [(True, message)]

    def limits(self, dtype: str) -> Limits:
        return LIMITS[f"merged {dtype}"]

    def write(self, subject: Subject, sample: Sample, dtype: str, folder: Path) -> list[str]:
        from tunery.models.portable import save_tokenizer

        write_weights(subject.weights, folder)
        _write_config(subject, folder)
        _write_generation_config(subject, folder)
        save_tokenizer(subject.tokenizer, folder)
        _copy_legal(subject.source.folder, folder)
        return []

    def read_back(
        self, subject: Subject, sample: Sample, tuned: TokenScores, dtype: str, folder: Path, device: str
    ) -> Verdict:
        from tunery.export.verify import check_tokenizer, free_memory, judge, version

        check_tokenizer(subject, sample, folder)
        exported, kept = _score(subject, sample, tuned, dtype, folder, device)
        free_memory()
        return judge(tuned, exported, self.limits(dtype), version("transformers"), sample, kept, "the merged model")


def _write_config(subject: Subject, folder: Path) -> None:
    """The base's own configuration, with what the merge changed, for older transformers too."""
    from tunery.models.portable import portable_config

    config = portable_config(read_json(subject.source.folder / "config.json"))
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)  # where somebody's copy lay
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and subject.weights.untied:
            part["tie_word_embeddings"] = False
    if subject.quantized:
        config["dtype"] = subject.numbers
        config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_generation_config(subject: Subject, folder: Path) -> None:
    """How the base's release generates, ending at the token that the adapter was trained to end an answer with.

    Servers and transformers' `generate` go by it, and not by the chat template.
    """
    from tunery.models.portable import ending_at

    file = subject.source.folder / "generation_config.json"
    base = read_json(file if file.is_file() else subject.source.folder / "config.json")
    own = {"bos_token_id", "eos_token_id", "pad_token_id"}  # the keys of config.json that are about generating
    stored = base if file.is_file() else {key: value for key, value in base.items() if key in own}
    write_json(folder / "generation_config.json", ending_at(stored, subject.renderer.stop_ids))


def _copy_legal(base: Path, folder: Path) -> None:
    for file in (file for pattern in _LEGAL for file in base.glob(pattern)):
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _score(
    subject: Subject, sample: Sample, tuned: TokenScores, dtype: str, folder: Path, device: str
) -> tuple[TokenScores, Kept]:
    from tunery.export.token_scores import compute_in_float32, score
    from tunery.export.updates import kept_in_model

    model = _load(folder, device)
    kept = kept_in_model(subject.weights, dtype, model.get_parameter)
    with compute_in_float32(model):
        return score(model, sample.probes, tuned), kept


def _load(folder: Path, device: str) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunery.export.subject import place_with_room
    from tunery.export.verify import AGAIN
    from tunery.models.hf_logging import quiet
    from tunery.models.load import attention_settings

    place = place_with_room(device, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    local: JsonObject = {"local_files_only": True, "trust_remote_code": False}
    with quiet():
        more = attention_settings(AutoConfig.from_pretrained(folder, **local))
        both: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, **local, **more
        )
    model, loaded = both
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        lost = sorted(map(str, (*loaded["missing_keys"], *loaded["mismatched_keys"])))
        raise AdapterError(f"the merged model lacks {', '.join(lost[:3])}", AGAIN)
    return model.requires_grad_(False).eval().to(place)


# --------------------------------------------------------------------------- safetensors


def write_weights(weights: MergedWeights, folder: Path) -> None:
    """Write the merged tensors as safetensors into an empty folder. Dtype, names of tensors and split into files are
    the base's. One slice of one tensor is in memory at a time."""
    base, files = weights.base, _layout(weights)
    for file, names in files.items():
        plans = {base.key(name): _planned(weights, name) for name in names}
        write_file(folder / file, plans, base.metadata(file))
    if len(files) > 1 or SINGLE not in files:
        total = sum(base.size(weights.origin(name)) for names in files.values() for name in names)
        places = {base.key(name): file for file, names in files.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _layout(weights: MergedWeights) -> dict[str, list[str]]:
    """File → the tensors in it: as the base has them, a head that is no longer tied beside its embedding."""
    files, known = weights.base.files(), set(weights.base.names())
    if not files:
        return _split(weights)
    for name in weights.names():
        if name not in known:
            tensors = next(tensors for tensors in files.values() if weights.origin(name) in tensors)
            tensors.insert(tensors.index(weights.origin(name)) + 1, name)
    return files


def _split(weights: MergedWeights) -> dict[str, list[str]]:
    parts: list[list[str]] = [[]]
    held = 0
    for name in weights.names():
        size = weights.base.size(weights.origin(name))
        if parts[-1] and held + size > LARGEST_FILE:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def _planned(weights: MergedWeights, name: str) -> Planned:
    base, origin = weights.base, weights.origin(name)
    return Planned(base.kind(origin), base.shape(origin), base.size(origin), _pieces(weights, name))


def _pieces(weights: MergedWeights, name: str) -> Iterator[memoryview]:
    if name not in weights.deltas:
        yield as_bytes(weights.base.read(weights.origin(name)))
        return
    dtype = weights.dtype(name)
    assert dtype is not None
    for rows in weights.slices(name):
        yield as_bytes(weights.wide(name, rows).to(dtype))


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its type as the format calls it, its shape, and its bytes in pieces."""

    kind: str
    shape: tuple[int, ...]
    size: int
    pieces: Iterable[bytes | memoryview]


def write_file(file: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> None:
    """Write a file, drawing each tensor's pieces when its turn comes."""
    header: JsonObject = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.kind,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for name, tensor in tensors.items():
            _write_pieces(handle, name, tensor)


def _write_pieces(handle: BinaryIO, name: str, tensor: Planned) -> None:
    written = 0
    for piece in tensor.pieces:
        handle.write(piece)
        written += memoryview(piece).nbytes
    if written != tensor.size:
        raise AssertionError(f"{name}: {written} bytes instead of {tensor.size}")


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in the order of its elements."""
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
