"""Engines elsewhere, played by an application in this process that answers as they do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.engine.wire import Model, chat, completion
from tunery.errors import ConfigError
from tunery.serve.api_errors import ApiError, Busy
from tunery.serve.engine.backend import TokenDelta, TokenLogprob, ToolCallDelta, Usage
from tunery.serve.engine.remote import RemoteBackend, _client_library

HTTP = _client_library()
Handler = Callable[[Any], Any]


class Elsewhere:
    """Answers requests, and keeps what it was asked.

    Args:
        chunks: of every stream.
        adapters: what llama.cpp lists; None plays vLLM.
    """

    def __init__(self, chunks: list[Any] | None = None, adapters: list[Any] | None = None, **answers: Any):
        self.chunks, self.adapters, self.answers = chunks or [], adapters, answers
        self.asked: list[tuple[str, Any, str | None]] = []

    def __call__(self, request: Any) -> Any:
        path, body = request.url.path, json.loads(request.content or b"null")
        self.asked.append((path, body, request.headers.get("authorization")))
        if path.strip("/").replace("/", "_") in self.answers:
            return self.answers[path.strip("/").replace("/", "_")]
        if path == "/v1/models":
            return HTTP.Response(200, json={"data": [{"id": "tuned", "parent": "big"}, {"id": "big"}]})
        if path == "/lora-adapters":
            return HTTP.Response(404) if self.adapters is None else HTTP.Response(200, json=self.adapters)
        if path.endswith("lora_adapter"):
            return HTTP.Response(200, text="Success")
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in self.chunks]
        return HTTP.Response(200, text=": hi\n\n" + "".join(lines) + "data: [DONE]\n\n")

    def bodies(self, path: str) -> list[Any]:
        return [body for where, body, _ in self.asked if where == path]


def run(elsewhere: Handler, work: Callable[[RemoteBackend], Any], **settings: Any) -> Any:
    async def main() -> Any:
        backend = RemoteBackend("http://engine/v1/", "secret", transport=HTTP.MockTransport(elsewhere), **settings)
        await backend.start()
        try:
            return await work(backend)
        finally:
            await backend.stop()

    return asyncio.run(main())


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
}


def test_a_chat_is_passed_on_with_its_settings() -> None:
    first = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hel"}}]}
    last = {"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": "stop"}]}
    there = Elsewhere([first, last, USAGE])
    request = chat("hi", temperature=0.5, seed=3, stop=["x"], max_tokens=7, logit_bias={"4": 1}, presence_penalty=1)
    items = run(there, lambda backend: collect(backend.chat(request, Model("base"))))
    assert items == [TokenDelta(0, "Hel"), TokenDelta(0, "lo", finish_reason="stop"), Usage(5, 2, 4)]
    (body,) = there.bodies("/v1/chat/completions")
    assert body == {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "big",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 3,
        "stop": ["x"],
        "max_tokens": 7,
        "logit_bias": {"4": 1.0},
        "presence_penalty": 1.0,
    }
    assert {key for _, _, key in there.asked} == {"Bearer secret"}


def test_calls_and_log_probabilities_come_back() -> None:
    call = {"index": 1, "id": "call_1", "function": {"name": "f", "arguments": '{"a"'}}
    more = {"index": 1, "function": {"arguments": ": 1}"}}
    token = {
        "token": "é",
        "logprob": -0.5,
        "bytes": [195, 169],
        "top_logprobs": [{"token": "e", "logprob": -1.0, "bytes": None}],
    }
    there = Elsewhere(
        [
            {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]},
            {"choices": [{"index": 0, "delta": {"tool_calls": [more]}, "logprobs": {"content": [token]}}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
            USAGE,
        ]
    )
    tool = {"type": "function", "function": {"name": "f"}}
    choice = {"type": "function", "function": {"name": "f"}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}}
    request = chat(tools=[tool], tool_choice=choice, logprobs=True, top_logprobs=1, response_format=form)
    items = run(there, lambda backend: collect(backend.chat(request, Model("base"))))
    assert items[0].tool_calls == (ToolCallDelta(1, "call_1", "f", '{"a"'),)
    assert items[1].tool_calls == (ToolCallDelta(1, None, None, ": 1}"),)
    assert items[1].logprobs == (TokenLogprob("é", -0.5, (195, 169), (TokenLogprob("e", -1.0, (101,)),)),)
    assert items[2].finish_reason == "tool_calls"
    (body,) = there.bodies("/v1/chat/completions")
    assert (body["tools"], body["tool_choice"], body["top_logprobs"]) == ([tool], choice, 1)
    assert body["response_format"] == form


def test_a_completion_is_passed_on() -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [None, -0.1], "top_logprobs": [None, {"b": -0.1, "c": -3.0}]}
    there = Elsewhere([{"choices": [{"index": 1, "text": "ab", "logprobs": logprobs, "finish_reason": "length"}]}])
    request = completion([[1, 2], [3]], echo=True, logprobs=2, max_tokens=2)
    items = run(there, lambda backend: collect(backend.complete(request, Model("base"))))
    assert items[0].logprobs[0].logprob is None
    assert [t.token for t in items[0].logprobs[1].top] == ["b", "c"]
    assert items[-1] == Usage(0, 0)
    (body,) = there.bodies("/v1/completions")
    assert (body["prompt"], body["echo"], body["logprobs"], body["max_tokens"]) == ([[1, 2], [3]], True, 2, 2)


def test_vllm_loads_an_adapter_once_when_it_is_asked_for(tmp_path: Path) -> None:
    there = Elsewhere([USAGE])
    model = Model("base", tmp_path, "ftjob-a/step-8")

    async def work(backend: RemoteBackend) -> None:
        await asyncio.gather(*(collect(backend.chat(chat(), model)) for _ in range(3)))
        assert backend.health()["adapters"] == ["ftjob-a/step-8"]
        backend.forget("ftjob-a/step-8")
        while not there.bodies("/v1/unload_lora_adapter"):
            await asyncio.sleep(0.001)

    run(there, work)
    assert there.bodies("/v1/load_lora_adapter") == [{"lora_name": "ftjob-a-step-8", "lora_path": str(tmp_path)}]
    assert {body["model"] for body in there.bodies("/v1/chat/completions")} == {"ftjob-a-step-8"}
    assert there.bodies("/v1/unload_lora_adapter") == [{"lora_name": "ftjob-a-step-8"}]


def test_vllm_that_loads_no_adapters_says_what_it_needs(tmp_path: Path) -> None:
    there = Elsewhere(v1_load_lora_adapter=HTTP.Response(404))
    with pytest.raises(ApiError, match="--enable-lora") as caught:
        run(there, lambda backend: collect(backend.chat(chat(), Model("base", tmp_path, "k"))))
    assert caught.value.status == 502


def test_llama_cpp_gets_adapters_by_number(tmp_path: Path) -> None:
    listed = [
        {"id": 0, "path": str(tmp_path / "adapter.gguf"), "scale": 1.0},
        {"id": 1, "path": "/x/ftjob-b-step-2.gguf"},
    ]
    there = Elsewhere([USAGE], adapters=listed)

    async def work(backend: RemoteBackend) -> None:
        await collect(backend.chat(chat(), Model("base", tmp_path, "ftjob-a")))
        await collect(backend.complete(completion("x"), Model("base", Path("/y"), "ftjob-b/step-2")))
        await collect(backend.chat(chat(), Model("base")))
        with pytest.raises(ApiError, match=r"--lora other\.gguf") as caught:
            await collect(backend.chat(chat(), Model("base", Path("/z"), "other")))
        assert caught.value.status == 404

    run(there, work)
    first, last = there.bodies("/v1/chat/completions")
    assert first["lora"] == [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0.0}]
    assert last["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]
    assert there.bodies("/v1/completions")[0]["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
    assert first["model"] == "big"


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (HTTP.Response(400, json={"error": {"message": "too long"}}), 400, "too long"),
        (HTTP.Response(422, json={"object": "error", "message": "odd"}), 400, "odd"),
        (HTTP.Response(500, text="boom"), 502, "boom"),
        (HTTP.Response(401, json={"error": "key"}), 502, "key"),
    ],
)
def test_refusals_are_told(answer: Any, status: int, words: str) -> None:
    there = Elsewhere(v1_chat_completions=answer)
    with pytest.raises(ApiError, match=words) as caught:
        run(there, lambda backend: collect(backend.chat(chat(), Model("base"))))
    assert caught.value.status == status


def test_a_full_engine_is_busy() -> None:
    there = Elsewhere(v1_chat_completions=HTTP.Response(429, headers={"retry-after": "7"}))
    with pytest.raises(Busy) as caught:
        run(there, lambda backend: collect(backend.chat(chat(), Model("base"))))
    assert caught.value.headers["retry-after"] == "7"


def test_an_error_in_the_stream_is_told() -> None:
    there = Elsewhere([{"error": {"message": "out of memory"}}])
    with pytest.raises(ApiError, match="out of memory"):
        run(there, lambda backend: collect(backend.chat(chat(), Model("base"))))


def test_an_engine_that_is_not_there_fails_the_start() -> None:
    def refuses(request: Any) -> Any:
        raise HTTP.ConnectError("refused")

    with pytest.raises(ConfigError, match="no engine answers at http://engine"):
        run(refuses, lambda backend: collect(backend.chat(chat(), Model("base"))))


def test_a_model_that_is_not_there_fails_the_start() -> None:
    with pytest.raises(ConfigError, match="no model small"):
        run(Elsewhere(), lambda backend: collect(backend.chat(chat(), Model("base"))), model="small")
