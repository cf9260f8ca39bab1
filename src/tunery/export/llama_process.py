"""llama.cpp in a process of its own: `python -m tunery.export.llama_process REQUEST ANSWER`, two JSON files.

It is apart because llama.cpp takes over the handling of signals, prints as it likes, and ends the whole process where
it meets what it does not expect. The request says which files to load and what to ask; see tunery.export.llama.
Only the package xllamacpp is needed here.
"""

from __future__ import annotations

import http.client
import importlib
import json
import os
import secrets
import sys
from typing import Any

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


def _load(request: dict[str, Any], key: str) -> Any:
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


def _package() -> Any:
    """xllamacpp, whose compiled part says nothing of what is in it."""
    return importlib.import_module("xllamacpp")


def _build() -> str:
    return f"xllamacpp {_package().__version__}"


class _Client:
    """Of the server's HTTP interface, for what the package does not offer as functions."""

    def __init__(self, address: str, key: str) -> None:
        self.host = address.split("://")[-1].rstrip("/")
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
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


def _prompt(ask: _Client, conversation: dict[str, Any]) -> dict[str, Any]:
    """A conversation as llama.cpp's chat endpoint renders and tokenises it."""
    body: dict[str, Any] = {"messages": conversation["messages"]}
    if conversation["tools"]:
        body["tools"] = conversation["tools"]
    try:
        text = ask("/apply-template", body)["prompt"]
    except RuntimeError as error:
        return {"error": str(error)}
    return {"text": text, "ids": _tokens(ask, text, True)}


def _tokens(ask: _Client, text: str, begin: bool) -> list[int]:
    return ask("/tokenize", {"content": text, "add_special": begin, "parse_special": True})["tokens"]


def _scores(server: Any, row: dict[str, Any], top: int) -> list[dict[str, Any]]:
    """What the model says of the row's own token at each place, and of its `top` likeliest ones."""
    return [_score(server, row["ids"][:at], row["ids"][at], top) for at in row["at"]]


def _score(server: Any, prompt: list[int], target: int, top: int) -> dict[str, Any]:
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
    likely = [[token["id"], token["logprob"]] for token in place["top_logprobs"]]
    if place["id"] != target:
        raise RuntimeError(f"token {place['id']} was drawn instead of {target}")
    return {"logprob": place["logprob"], "top": likely}


def _answer(server: Any, question: dict[str, Any]) -> str:
    result = server.handle_chat_completions({"temperature": 0.0, "cache_prompt": True, **question})
    if "choices" not in result:
        raise RuntimeError(json.dumps(result))
    return result["choices"][0]["message"]["content"]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
