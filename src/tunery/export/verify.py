"""What targets need to compare what they wrote, in the program it is for, with the adapter in tunery."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunery.errors import AdapterError
from tunery.export.exact import compute_in_float32
from tunery.export.layers import Kept
from tunery.export.limits import Limits
from tunery.export.llama import Answers, ask_llama
from tunery.export.room import place_with_room
from tunery.export.sample import Sample
from tunery.export.scores import Scores, compare, score
from tunery.export.subject import Subject
from tunery.export.tokens import AGAIN, same_text, same_tokens
from tunery.lora.attach import place, remove
from tunery.models.load import load_base
from tunery.versions import version_of

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

    def as_dict(self) -> dict[str, Any]:
        """For export.json."""
        return {
            "runtime": self.runtime, "difference": self.difference, "limits": self.limits,
            "identical_prompts": self.prompts, "identical_texts": self.texts, "update": self.kept.as_dict(),
        }  # fmt: skip


def score_tuned(subject: Subject, sample: Sample, device: str) -> Scores:
    """What the adapter says in tunery: on the base as it is stored, computed in float32."""
    scores = _score_tuned(subject, sample, device)
    free_memory()
    return scores


def _score_tuned(subject: Subject, sample: Sample, device: str) -> Scores:
    model = subject.held if subject.held is not None else load_stored(subject, device)
    place(model, "export", subject.pieces, trainable=False)
    with compute_in_float32(model):
        scores = score(model, sample.probes)
    if subject.held is not None:
        remove(model, "export")
    return scores


def load_stored(subject: Subject, device: str) -> Any:
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
    tuned: Scores,
    exported: Scores,
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
    return Verdict(
        runtime, difference.as_dict(), limits.as_dict(), len(sample.prompts), len(sample.texts), kept
    )  # fmt: skip


def version(package: str) -> str:
    """A package and its version, as a runtime."""
    return f"{package} {version_of(package)}"


def ask(subject: Subject, sample: Sample, file: Path, adapter: Path | None) -> Answers:
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
            same_text(prompt.text, found["text"], subject.tokenizer.bos_token or "")
        same_tokens(prompt.ids, found["ids"], "llama.cpp", decode)
    wanted = [ids for _, ids in sample.texts] + ([] if templated else [p.ids for p in sample.prompts])
    for ids, found in zip(wanted, answers.texts, strict=True):
        same_tokens(ids, found, "llama.cpp", decode)
    return answers
