"""A backend that repeats what it is told, or does what a test asks of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tests.serve.fakes import Served
from tunery.serve.api_errors import ApiError, Busy
from tunery.serve.engine.backend import TokenDelta, TokenLogprob, ToolCallDelta, Usage
from tunery.serve.schemas import ChatRequest, CompletionRequest


class EchoBackend:
    """Answers "you said: …", a word at a time. What is said can ask for trouble: see `_trouble`.

    Attributes:
        open: answers being made now.
        closed: answers that were closed before their end.
        release: lets an answer to "wait" go on.
    """

    def __init__(self) -> None:
        self.open = self.closed = 0
        self.started = self.stopped = False
        self.forgotten: list[str] = []
        self.release = asyncio.Event()
        self.asked: list[Any] = []

    async def start(self) -> None:
        self.started, self.loop = True, asyncio.get_running_loop()

    async def stop(self) -> None:
        self.stopped = True

    def forget(self, key: str) -> None:
        self.forgotten.append(key)

    def health(self) -> dict[str, Any]:
        return {"active": self.open, "waiting": 0}

    async def chat(self, request: ChatRequest, model: Served) -> AsyncIterator[TokenDelta | Usage]:
        said = request.messages[-1]["content"]
        words = _json_of(request.response_format) or ["you ", "said: ", *said.split()]
        async for item in self._answer(request, said, words, range(request.n), request.max_completion_tokens):
            yield item

    async def complete(self, request: CompletionRequest, model: Served) -> AsyncIterator[TokenDelta | Usage]:
        prompts = [prompt if isinstance(prompt, str) else str(prompt) for prompt in request.prompt]
        for number, prompt in enumerate(prompts):
            words = [*([prompt] if request.echo else []), *(f"{word} " for word in prompt.split())]
            choices = range(number * request.n, (number + 1) * request.n)
            limit = request.max_tokens + request.echo
            async for item in self._answer(request, prompt, words, choices, limit):
                if number == len(prompts) - 1 or isinstance(item, TokenDelta):
                    yield item

    async def _answer(
        self, request: Any, said: str, words: Sequence[str], choices: range, limit: int | None
    ) -> AsyncIterator[TokenDelta | Usage]:
        self.asked.append(request)
        self.open += 1
        done = False
        try:
            await self._trouble(said)
            calls = isinstance(request, ChatRequest) and request.tool_mode[0] == "required"
            for index in choices:
                for delta in _call(request, index) if calls else _words(request, index, words, limit):
                    yield delta
                    if "break" in said:
                        raise RuntimeError("the engine broke")
                    if "wait" in said:
                        await self.release.wait()
            yield Usage(len(said.split()), len(words) * len(choices), 1)
            done = True
        finally:
            self.open -= 1
            self.closed += not done

    async def _trouble(self, said: str) -> None:
        if "busy" in said:
            raise Busy(6.2)
        if "too long" in said:
            raise ApiError(400, "the prompt is too long", code="context_length_exceeded", param="messages")
        if "bug" in said:
            raise RuntimeError("secret detail of a bug")
        if "silent" in said:
            await self.release.wait()


def _words(request: Any, index: int, words: Sequence[str], limit: int | None) -> list[TokenDelta]:
    wanted = request.logprobs is not None and request.logprobs is not False
    top = request.top_logprobs if isinstance(request, ChatRequest) else request.logprobs or 0
    shown = words[:limit]
    deltas = [TokenDelta(index, word, logprobs=(_logprob(word, top),) if wanted else ()) for word in shown]
    return [*deltas, TokenDelta(index, finish_reason="length" if len(shown) < len(words) else "stop")]


def _logprob(word: str, top: int) -> TokenLogprob:
    others = tuple(TokenLogprob(f"{word}{n}", -2.0 - n, tuple(f"{word}{n}".encode())) for n in range(top))
    return TokenLogprob(word, -0.5, tuple(word.encode()), others)


def _call(request: ChatRequest, index: int) -> list[TokenDelta]:
    name = request.tool_mode[1] or request.tools[0]["function"]["name"]
    return [
        TokenDelta(index, tool_calls=(ToolCallDelta(0, "call_1", name, '{"city": '),)),
        TokenDelta(index, tool_calls=(ToolCallDelta(0, None, None, '"Oslo"}'),)),
        TokenDelta(index, finish_reason="tool_calls"),
    ]


def _json_of(wanted: Any) -> list[str]:
    """A value of a flat schema, in pieces."""
    if wanted.type == "text":
        return []
    properties = (wanted.json_schema.schema_ or {}).get("properties", {}) if wanted.json_schema else {}
    values = {"string": '"Ada"', "integer": "36"}
    pairs = [f'"{name}": {values[part["type"]]}' for name, part in properties.items()]
    return ["{", *itertools.chain.from_iterable(((", ", pair) if n else (pair,)) for n, pair in enumerate(pairs)), "}"]
