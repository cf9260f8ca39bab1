"""The tokens of prompts and texts must be the same in an export as in training: a model answers badly to others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunery.data.render import Renderer
from tunery.errors import AdapterError
from tunery.export.sample import Sample
from tunery.export.subject import Subject
from tunery.models.hf_logging import quiet

AGAIN = "this is a bug in tunery, or the export was changed while it was written; please report it"


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


def same_tokens(wanted: Sequence[int], found: Sequence[int], who: str, decode: Callable[[list[int]], Any]) -> None:
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


def _shown(ids: Sequence[int], spot: int, decode: Callable[[list[int]], Any]) -> str:
    if spot >= len(ids):
        return "the end"
    return f"{decode([ids[spot]])!r} ({ids[spot]})"
