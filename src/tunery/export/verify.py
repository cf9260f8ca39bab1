"""What targets need to compare what they wrote, in the program it is for, with the adapter in tunery: its tokens, what
is left of each layer's update, and what it says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from torch import Tensor

from tunery.data.render import Renderer
from tunery.errors import AdapterError
from tunery.export.gguf_file import EMBEDDING, Entry, pair, placed_pieces, stored
from tunery.export.limits import Limits
from tunery.export.llama_cpp import LlamaAnswers, ask_llama
from tunery.export.subject import Sample, Subject, place_with_room
from tunery.export.token_scores import TokenScores, compare, compute_in_float32, score
from tunery.export.weights import MergedWeights, slices_of
from tunery.jsonl import JsonObject
from tunery.lora.attach import place, remove
from tunery.models.hf_logging import quiet
from tunery.models.load import load_base
from tunery.versions import version_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AGAIN = "this is a bug in tunery, or the export was changed while it was written; please report it"

MORE_BITS = "nothing was kept; take more bits (--quantize), or another format"
"""What to do about a GGUF file that differs too much."""


@dataclass(frozen=True)
class Verdict:
    """What a comparison found; the content of export.json's "comparison".

    Attributes:
        runtime: the program and its version.
        kept: how much of each layer's update is there.
    """

    runtime: str
    difference: dict[str, float | int]
    limits: dict[str, float]
    prompts: int
    texts: int
    kept: Kept

    def as_dict(self) -> JsonObject:
        """For export.json."""
        return {
            "runtime": self.runtime,
            "difference": self.difference,
            "limits": self.limits,
            "identical_prompts": self.prompts,
            "identical_texts": self.texts,
            "update": self.kept.as_dict(),
        }


def score_tuned(subject: Subject, sample: Sample, device: str) -> TokenScores:
    """What the adapter says in tunery: on the base as it is stored, computed in float32."""
    scores = _score_tuned(subject, sample, device)
    free_memory()
    return scores


def _score_tuned(subject: Subject, sample: Sample, device: str) -> TokenScores:
    model = subject.held if subject.held is not None else load_stored(subject, device)
    place(model, "export", subject.pieces, trainable=False)
    with compute_in_float32(model):
        scores = score(model, sample.probes)
    if subject.held is not None:
        remove(model, "export")
    return scores


def load_stored(subject: Subject, device: str) -> PreTrainedModel:
    """The base as its files hold it, or widened where tunery has no such format."""
    precision = subject.numbers if subject.numbers in ("bfloat16", "float16") else "float32"
    needed = subject.source.count_weights() * getattr(torch, precision).itemsize
    return load_base(subject.task.model, precision=precision, device=place_with_room(device, needed)).model


def free_memory() -> None:
    """Give back what a model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def judge(
    tuned: TokenScores,
    exported: TokenScores,
    limits: Limits,
    runtime: str,
    sample: Sample,
    kept: Kept,
    what: str,
    hint: str = AGAIN,
) -> Verdict:
    """The verdict on an export whose tokens are seen to be those of the training.

    Args:
        hint: what to do where it is too far.

    Raises:
        AdapterError: it differs by more than its limits.
    """
    difference = compare(tuned, exported)
    if wrong := difference.beyond(limits):
        raise AdapterError(
            f"{what} is not what was trained: in {runtime}, over {difference.positions:,} answer tokens, "
            f"{'; '.join(wrong)}",
            hint,
        )
    return Verdict(runtime, difference.as_dict(), limits.as_dict(), len(sample.prompts), len(sample.texts), kept)


def version(package: str) -> str:
    """A package and its version, as a runtime."""
    return f"{package} {version_of(package)}"


def ask(subject: Subject, sample: Sample, file: Path, adapter: Path | None) -> LlamaAnswers:
    """Score the sample in llama.cpp, once its tokens are seen to be those of the training."""
    templated = subject.kind.templated
    asked = [(text, False) for text, _ in sample.texts]
    if not templated:
        asked += [(prompt.text, True) for prompt in sample.prompts]
    answers = ask_llama(
        file, adapter=adapter, prompts=sample.prompts if templated else (), texts=asked, probes=sample.probes
    )
    decode = subject.tokenizer.decode
    for prompt, found in zip(sample.prompts, answers.prompts, strict=False) if templated else ():
        if "error" in found:
            raise AdapterError(
                f"llama.cpp cannot use the chat template: {found['error']}", "use --to merged, or another base"
            )
        if list(prompt.ids) != found["ids"]:
            same_text(prompt.text, found["text"], str(subject.tokenizer.bos_token or ""))
        same_tokens(prompt.ids, found["ids"], "llama.cpp", decode)
    wanted = [ids for _, ids in sample.texts] + ([] if templated else [p.ids for p in sample.prompts])
    for ids, found in zip(wanted, answers.texts, strict=True):
        same_tokens(ids, found, "llama.cpp", decode)
    return answers


# --------------------------------------------------------------------------- tokens


def check_tokenizer(subject: Subject, sample: Sample, folder: Path) -> None:
    """Refuse an exported tokenizer or chat template that gives other tokens.

    Raises:
        AdapterError: another template, prompt or text.
    """
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    mine = subject.renderer
    renderer = Renderer(tokenizer, labels=mine.labels, instruction=mine.instruction, system=mine.system)
    if renderer.template_sha256 != mine.template_sha256:
        raise AdapterError("the exported chat template is not the one of the training", AGAIN)
    for prompt in sample.prompts:
        text = renderer.prompt(prompt.messages, prompt.tools) if prompt.messages else prompt.text
        ids = renderer.encode_prompt(text, begin=not prompt.messages)
        same_tokens(prompt.ids, ids, "the exported tokenizer", tokenizer.decode)
    for text, ids in sample.texts:
        same_tokens(ids, renderer.encode_prompt(text), "the exported tokenizer", tokenizer.decode)


def same_text(wanted: str, found: str, bos: str) -> None:
    """Refuse a conversation that llama.cpp renders in another way; the text of the first token (`bos`) it leaves out,
    because it puts the token there itself.

    Raises:
        AdapterError: with the place where they part.
    """
    if found in (wanted, wanted.removeprefix(bos)):
        return
    shorter = min(len(wanted), len(found))
    spot = next((i for i in range(shorter) if wanted[i] != found[i]), shorter)
    before, mine, theirs = wanted[max(0, spot - 30) : spot], wanted[spot : spot + 20], found[spot : spot + 20]
    raise AdapterError(
        f"llama.cpp renders a conversation in another way than the training did: after {before!r} there is {mine!r} in "
        f"training, {theirs!r} there",
        "llama.cpp writes each tool as name, description and parameters, in that order: give yours so; or use another "
        "format",
    )


def same_tokens(wanted: Sequence[int], found: Sequence[int], who: str, decode: Callable[[list[int]], object]) -> None:
    """Refuse tokens that are not those of the training.

    Args:
        who: cut the text, in words.

    Raises:
        AdapterError: with the place where they part.
    """
    if list(wanted) == list(found):
        return
    shorter = min(len(wanted), len(found))
    spot = next((i for i in range(shorter) if wanted[i] != found[i]), shorter)
    before = str(decode(list(wanted[max(0, spot - 6) : spot])))
    raise AdapterError(
        f"{who} cuts a text in another way than the training did: after {before!r} there is "
        f"{_shown(wanted, spot, decode)} in training, {_shown(found, spot, decode)} there",
        "a model answers badly to other tokens than it was trained on, so nothing was kept",
    )


def _shown(ids: Sequence[int], spot: int, decode: Callable[[list[int]], object]) -> str:
    if spot >= len(ids):
        return "the end"
    return f"{decode([ids[spot]])!r} ({ids[spot]})"


# --------------------------------------------------------------------------- updates

LEAST = 0.5
"""Smallest share of an update that must be left."""

SURE = 0.1
"""Spread of the slope, by the size of the rest, above which it says nothing (an update next to nothing)."""

ROUNDING = {
    "float64": 2.0**-23,
    "float32": 2.0**-23,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "f32": 2.0**-23,
    "f16": 2.0**-11,
    "bf16": 2.0**-8,
}
"""Largest relative error of one rounding, by dtype. A weight within it holds all that the format can."""

_SMALLEST = 1e-7
"""Absolute error that is rounding whatever the format (numbers below half precision's normal range)."""


@dataclass(frozen=True)
class Kept:
    """How much of the update is in the export, over all adapted layers. Answers may hardly change when one of hundreds
    of updates is lost, so each is looked for in the weights themselves.

    For a base weight W, an update D and the exported weight E, the share of the update that is in E is the slope of
    E − W over D: ⟨E − W, D⟩ / ⟨D, D⟩, 1 where it is there and 0 where it is lost. What rounding adds is hardly ever in
    the direction of D, so the slope is sharp even where rounding is larger than the update.

    Attributes:
        layers: looked at.
        measured: those whose slope is sharp.
        mean, least: share of the update, over the measured layers; None if there are none.
        where: the layer with the least.
    """

    layers: int
    measured: int
    mean: float | None
    least: float | None
    where: str | None

    def as_dict(self) -> JsonObject:
        """For export.json."""
        return {
            "layers": self.layers,
            "measured": self.measured,
            "mean_share": self.mean,
            "least_share": self.least,
            "least_in": self.where,
        }


class _Slope:
    """Sums over the parts of one layer."""

    def __init__(self) -> None:
        self.dot = self.size = self.moved = 0.0
        self.count = 0
        self.rounded = True

    def add(self, base: np.ndarray, update: np.ndarray, exported: np.ndarray, rounding: float | None) -> None:
        moved = exported.astype(np.float64) - base
        self.dot += float((moved * update).sum())
        self.size += float((update.astype(np.float64) ** 2).sum())
        self.moved += float((moved**2).sum())
        self.count += update.size
        if rounding is None:
            self.rounded = False
        else:
            wanted = base.astype(np.float64) + update
            error = np.abs(exported - wanted) - 1.01 * rounding * np.abs(wanted)
            self.rounded &= bool((error <= _SMALLEST).all())

    def add_update(self, wanted: Tensor, found: Tensor) -> None:
        """Rows of an update that lies there by itself, without a base."""
        self.add(np.zeros(wanted.shape), wanted.numpy(), found.numpy(), None)

    @property
    def share(self) -> float | None:
        """The slope; None where the update is nothing, or the slope is not sharp."""
        if self.size == 0.0:
            return None
        slope = self.dot / self.size
        rest = max(self.moved - slope * self.dot, 0.0)
        sharp = (rest / self.count / self.size) ** 0.5 < SURE
        return slope if sharp else None


def _kept(slopes: Iterable[tuple[str, _Slope]]) -> Kept:
    shares: dict[str, float] = {}
    number = 0
    for name, slope in slopes:
        number += 1
        share = slope.share
        if share is None:
            continue
        shares[name] = share
        if not slope.rounded and not LEAST <= share <= 2 - LEAST:
            raise AdapterError(f"the update of {name} is not in the export: {round(share, 2) + 0.0:.0%} of it is there")
    if not shares:
        return Kept(number, 0, None, None, None)
    where = min(shares, key=lambda name: shares[name])
    return Kept(number, len(shares), float(np.mean(list(shares.values()))), shares[where], where)


def kept_in_model(weights: MergedWeights, numbers: str, exported: Callable[[str], Tensor]) -> Kept:
    """Of a merged model in memory.

    Args:
        numbers: its dtype.
        exported: a weight by its name.

    Raises:
        AdapterError: a layer's update is lost.
    """

    def slopes() -> Iterable[tuple[str, _Slope]]:
        for name in weights.deltas:
            slope, found = _Slope(), exported(name)
            for rows in weights.slices(name):
                base = weights.base.read(weights.origin(name), rows).float().numpy()
                here = found[rows].detach().float().cpu().numpy()
                slope.add(base, weights.update(name, rows).float().numpy(), here, ROUNDING[numbers])
            yield name, slope

    return _kept(slopes())


def kept_in_gguf(weights: MergedWeights, entries: Iterable[Entry], file: Path, numbers: str) -> Kept:
    """Of a merged model in a GGUF file.

    Raises:
        AdapterError: a layer's update is lost.
    """
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    alone = weights.without_update()

    def slopes() -> Iterable[tuple[str, _Slope]]:
        for entry in entries:
            if entry.source not in weights.deltas:
                continue
            slope, tensor = _Slope(), there[entry.place.name]
            rounding = ROUNDING.get(tensor.tensor_type.name.lower())
            for rows in weights.slices(entry.source) if entry.place.plain else [None]:
                merged, base = stored(weights, entry, rows), stored(alone, entry, rows)
                data = tensor.data if rows is None else tensor.data[rows]
                here = gguf.quants.dequantize(np.ascontiguousarray(data), tensor.tensor_type).reshape(merged.shape)
                slope.add(base, merged - base, here, rounding)
            yield entry.source, slope

    return _kept(slopes())


def kept_in_adapter(subject: Subject, file: Path) -> Kept:
    """Of an adapter in a GGUF file.

    Raises:
        AdapterError: a layer's update is lost, or another one.
    """
    reader = gguf.GGUFReader(file)
    there = {t.name: gguf.quants.dequantize(np.ascontiguousarray(t.data), t.tensor_type) for t in reader.tensors}
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())

    def slopes() -> Iterable[tuple[str, _Slope]]:
        for (spot, piece), path in zip(placed_pieces(subject), subject.pieces, strict=True):
            wanted = [torch.from_numpy(t.copy()) for t in pair(spot, piece, alpha)]
            found = [torch.from_numpy(there[f"{spot.name}.lora_{letter}"].copy()) for letter in "ab"]
            if spot.name == EMBEDDING:
                wanted[0], found[0] = wanted[0].t(), found[0].t()
            slope, (A, B) = _Slope(), wanted
            for rows in slices_of((B.shape[0], A.shape[1])):
                slope.add_update(B[rows] @ A, found[1][rows] @ found[0])
            yield path, slope

    return _kept(slopes())


def kept_in_layers(subject: Subject, found: Callable[[str], tuple[Tensor, Tensor, float]]) -> Kept:
    """Of an adapter in memory, in another library.

    Args:
        found: A, B and s of a layer as that library holds them.

    Raises:
        AdapterError: a layer's update is lost, or another one.
    """

    def slopes() -> Iterable[tuple[str, _Slope]]:
        for name, delta in subject.weights.deltas.items():
            slope, parts = _Slope(), found(name.removesuffix(".weight"))
            for rows in slices_of(delta.shape):
                slope.add_update(delta.rows(rows), delta.of(*parts, rows))
            yield name, slope

    return _kept(slopes())
