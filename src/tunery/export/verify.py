"""What targets need to compare what they wrote, in the program it is for, with the adapter in tunery: its tokens, and
what it says at the answer tokens."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunery.data.render import Renderer
from tunery.errors import AdapterError
from tunery.export.llama_cpp import LlamaAnswers, ask_llama
from tunery.export.subject import Sample, Subject, place_with_room
from tunery.export.targets.base import Limits
from tunery.export.token_scores import TokenScores, compare, compute_in_float32, score
from tunery.export.updates import Kept
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
