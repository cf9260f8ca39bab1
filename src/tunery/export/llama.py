"""Asking llama.cpp about an exported file: how it renders and tokenises, and what it says at the answer tokens."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunery.errors import AdapterError, NotInstalledError
from tunery.export.sample import Prompt
from tunery.export.token_scores import Probe, TokenScores
from tunery.paths import read_json, write_json
from tunery.versions import install_command

ASKED_FOR = 1024
"""Likeliest tokens asked for at each place. Those of the tuned model that are not among them count with the rest."""

ROOM = 64
"""Context beyond the longest row."""

_LAST = 12
"""Lines of llama.cpp's own words that a message shows."""


@dataclass(frozen=True)
class LlamaAnswers:
    """What llama.cpp answered.

    Attributes:
        build: which it was.
        prompts: {"text", "ids"} of each conversation as its chat endpoint sees it, or {"error"}.
        texts: token ids of each text.
        scores: of each row, at each place, {"logprob", "top": [[id, log-probability], …]}.
        answers: to each question.
    """

    build: str
    prompts: list[dict[str, Any]] = field(repr=False)
    texts: list[list[int]] = field(repr=False)
    scores: list[list[dict[str, Any]]] = field(repr=False)
    answers: list[str] = field(repr=False)


def require_llama() -> None:
    """Make sure that llama.cpp is there.

    Raises:
        ConfigError: the package xllamacpp is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise NotInstalledError(
            "a GGUF file is checked in llama.cpp, and the package xllamacpp is not installed",
            install_command("export"),
        )


def ask_llama(
    model: Path,
    *,
    adapter: Path | None = None,
    prompts: Sequence[Prompt] = (),
    texts: Sequence[tuple[str, bool]] = (),
    probes: Sequence[Probe] = (),
    questions: Sequence[dict[str, Any]] = (),
    top: int = ASKED_FOR,
) -> LlamaAnswers:
    """Load a GGUF file in llama.cpp, in a process of its own, and ask.

    Args:
        adapter: a GGUF file to put on it.
        prompts: conversations to render.
        texts: to tokenise; True: with what belongs before a prompt.
        probes: rows to score.
        questions: bodies of chat requests.
        top: likeliest tokens to name at each place.

    Raises:
        AdapterError: llama.cpp refuses the file, or ends on it; with its last words.
    """
    import torch

    longest = max([len(p.ids) for p in probes] + [len(p.ids) for p in prompts] + [512])
    with tempfile.TemporaryDirectory(prefix="tunery-llama-") as folder:
        request, answer, log = (Path(folder) / name for name in ("request.json", "answer.json", "log.txt"))
        write_json(
            request,
            {
                "model": str(model.absolute()),
                "adapter": str(adapter.absolute()) if adapter else None,
                "context": longest + ROOM,
                "threads": torch.get_num_threads(),
                "top": top,
                "conversations": [{"messages": p.messages, "tools": p.tools} for p in prompts],
                "texts": [{"text": text, "begin": begin} for text, begin in texts],
                "rows": [{"ids": p.ids, "at": p.at} for p in probes],
                "questions": list(questions),
            },
        )
        command = [sys.executable, "-P", "-m", "tunery.export.llama_process", str(request), str(answer)]
        with open(log, "wb") as words:
            code = subprocess.run(command, stdout=words, stderr=words, stdin=subprocess.DEVNULL, check=False).returncode
        if code or not answer.exists():
            last = "\n    ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LAST:])
            raise AdapterError(f"llama.cpp does not take {model.name} (it ended with {code}):\n    {last}")
        return LlamaAnswers(**read_json(answer))


def as_scores(answers: LlamaAnswers, tuned: TokenScores) -> TokenScores:
    """llama.cpp's log-probabilities of the tokens that `tuned` knows; NaN where it did not name one."""
    places = [place for row in answers.scores for place in row]
    known = np.full(tuned.ids.shape, np.nan)
    best = np.empty(len(places), np.int64)
    for number, place in enumerate(places):
        ids, logs = (np.asarray(column) for column in zip(*place["top"], strict=True))
        order = np.argsort(ids)
        spot = np.minimum(np.searchsorted(ids[order], tuned.ids[number]), len(ids) - 1)
        found = ids[order][spot] == tuned.ids[number]
        known[number, found] = logs[order][spot][found]
        best[number] = ids[logs.argmax()]
    target = np.asarray([place["logprob"] for place in places], np.float64)
    return TokenScores(target, best, tuned.ids, known)
