"""Asking llama.cpp about an exported file: how it renders and tokenises, and what it says at the answer tokens.

llama.cpp takes over the handling of signals, prints as it likes, and ends the whole process where it meets what it does
not expect. So it is asked in a process of its own, which runs this module:
`python -m tunery.export.llama_cpp REQUEST ANSWER`, two JSON files. Nothing heavy is imported there but the package
xllamacpp.
"""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypedDict

from tunery.errors import AdapterError, NotInstalledError
from tunery.jsonl import JsonMapping, JsonObject
from tunery.paths import read_json, write_json
from tunery.versions import install_command

if TYPE_CHECKING:
    from tunery.export.subject import Prompt
    from tunery.export.token_scores import Probe, TokenScores

ASKED_FOR = 1024
"""Likeliest tokens asked for at each place. Those of the tuned model that are not among them count with the rest."""

ROOM = 64
"""Context beyond the longest row."""

_LAST = 12
"""Lines of llama.cpp's own words that a message shows."""


class RenderedPrompt(TypedDict):
    """A conversation as llama.cpp's chat endpoint sees it."""

    text: str
    ids: list[int]


class RefusedPrompt(TypedDict):
    """A conversation that the chat endpoint does not take, and why."""

    error: str


class PlaceScores(TypedDict):
    """What the model says at one place of a row: of the row's own token, and of the likeliest ones [id, nats]."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class LlamaAnswers:
    """What llama.cpp answered.

    Attributes:
        build: which it was.
        prompts: of each conversation.
        texts: token ids of each text.
        scores: of each row, at each place.
        answers: to each question.
    """

    build: str
    prompts: list[RenderedPrompt | RefusedPrompt] = field(repr=False)
    texts: list[list[int]] = field(repr=False)
    scores: list[list[PlaceScores]] = field(repr=False)
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
    questions: Sequence[JsonMapping] = (),
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
        command = [sys.executable, "-P", "-m", "tunery.export.llama_cpp", str(request), str(answer)]
        with open(log, "wb") as words:
            code = subprocess.run(command, stdout=words, stderr=words, stdin=subprocess.DEVNULL, check=False).returncode
        if code or not answer.exists():
            last = "\n    ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LAST:])
            raise AdapterError(f"llama.cpp does not take {model.name} (it ended with {code}):\n    {last}")
        return LlamaAnswers(**read_json(answer))


def as_scores(answers: LlamaAnswers, tuned: TokenScores) -> TokenScores:
    """llama.cpp's log-probabilities of the tokens that `tuned` knows; NaN where it did not name one."""
    import numpy as np

    from tunery.export.token_scores import TokenScores

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


# --------------------------------------------------------------------------- in the process of its own

BIAS = 1e4
"""Added to the logit of the row's own token, so that it is the one drawn. The probabilities reported are those from
before."""


def main(request_file: str, answer_file: str) -> None:
    """Load, ask, write the answers, and leave without waiting for threads."""
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    key = secrets.token_hex(16)
    server = _load(request, key)
    ask = _Client(server.listening_address, key)
    answer = {
        "build": _build(),
        "prompts": [_prompt(ask, conversation) for conversation in request["conversations"]],
        "texts": [_tokens(ask, text["text"], text["begin"]) for text in request["texts"]],
        "scores": [_scores(server, row, request["top"]) for row in request["rows"]],
        "answers": [_answer(server, question) for question in request["questions"]],
    }
    with open(answer_file, "w", encoding="utf-8") as file:
        json.dump(answer, file)
    sys.stdout.flush()
    os._exit(0)


class _Server(Protocol):
    """xllamacpp's, whose compiled part says nothing of what is in it."""

    listening_address: str

    def handle_completions(self, body: JsonObject) -> JsonObject: ...

    def handle_chat_completions(self, body: JsonObject) -> JsonObject: ...


def _load(request: JsonObject, key: str) -> _Server:
    xllamacpp = _package()
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = request["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.api_keys = [key]  # nobody else on this machine is served
    params.warmup = params.fit_params = False
    params.swa_full = True  # else a model with sliding windows forgets the beginning of a row, and computes it again
    params.cache_ram_mib = 0
    if request["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"], 1.0)]
    return xllamacpp.Server(params)


def _package() -> ModuleType:
    return importlib.import_module("xllamacpp")


def _build() -> str:
    return f"xllamacpp {_package().__version__}"


class _Client:
    """Of the server's HTTP interface, for what the package does not offer as functions."""

    def __init__(self, address: str, key: str) -> None:
        self.host = address.split("://")[-1].rstrip("/")
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def __call__(self, path: str, body: JsonObject) -> JsonObject:
        connection = http.client.HTTPConnection(self.host, timeout=600)
        try:
            connection.request("POST", path, json.dumps(body), self.headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path}: {text}")
        return json.loads(text)


def _prompt(ask: _Client, conversation: JsonObject) -> RenderedPrompt | RefusedPrompt:
    """A conversation as llama.cpp's chat endpoint renders and tokenises it."""
    body: JsonObject = {"messages": conversation["messages"]}
    if conversation["tools"]:
        body["tools"] = conversation["tools"]
    try:
        text = ask("/apply-template", body)["prompt"]
    except RuntimeError as error:
        return {"error": str(error)}
    return {"text": text, "ids": _tokens(ask, text, True)}


def _tokens(ask: _Client, text: str, begin: bool) -> list[int]:
    return ask("/tokenize", {"content": text, "add_special": begin, "parse_special": True})["tokens"]


def _scores(server: _Server, row: JsonObject, top: int) -> list[PlaceScores]:
    """What the model says of the row's own token at each place, and of its `top` likeliest ones."""
    return [_score(server, row["ids"][:at], row["ids"][at], top) for at in row["at"]]


def _score(server: _Server, prompt: list[int], target: int, top: int) -> PlaceScores:
    result = server.handle_completions(
        {
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0.0,
            "n_probs": top,
            "logit_bias": [[target, BIAS]],
            "cache_prompt": True,
            "post_sampling_probs": False,
        }
    )
    if "choices" not in result:
        raise RuntimeError(json.dumps(result))
    place = result["choices"][0]["logprobs"]["content"][0]
    likely = [(token["id"], token["logprob"]) for token in place["top_logprobs"]]
    if place["id"] != target:
        raise RuntimeError(f"token {place['id']} was drawn instead of {target}")
    return {"logprob": place["logprob"], "top": likely}


def _answer(server: _Server, question: JsonObject) -> str:
    result = server.handle_chat_completions({"temperature": 0.0, "cache_prompt": True, **question})
    if "choices" not in result:
        raise RuntimeError(json.dumps(result))
    return result["choices"][0]["message"]["content"]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
