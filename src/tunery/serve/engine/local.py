"""The built-in engine behind the routes' protocol: requests become rows, and what the engine's thread sends becomes an
asynchronous stream."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunery.data.render import Renderer
from tunery.models.load import Base, load_base
from tunery.serve.engine.backend import Item, Served, Usage
from tunery.serve.engine.batch import Limits
from tunery.serve.engine.constrain import Grammars, Matcher, json_grammar
from tunery.serve.engine.engine import Engine
from tunery.serve.engine.prompts import Prompts
from tunery.serve.engine.rows import Asked, Echo, Row
from tunery.serve.engine.sampling import Sampler, Sampling
from tunery.serve.engine.text import Detokenizer, TextStream, TokenTexts
from tunery.serve.engine.tools import ToolReader, call_grammar, control_pattern, find_form
from tunery.serve.errors import ApiError

if TYPE_CHECKING:
    from tunery.serve.schemas import ChatRequest, CompletionRequest

SPACE_BEFORE = 6
"""Tokens of a prompt that are decoded with the answer's first, so that its space shows (plain completions)."""


class LocalBackend:
    """One base and its adapters, answered by this process.

    Args:
        base: as Task.model names it, or one that is loaded already.
        device, precision, quantize: see tunery.models.load.load_base.
        limits: see Limits.
    """

    def __init__(
        self,
        base: str | Base,
        *,
        device: str = "auto",
        precision: str = "auto",
        quantize: str = "none",
        limits: Limits | None = None,
    ):
        self.name = base if isinstance(base, str) else base.info.name
        self._load = functools.partial(load_base, device=device, precision=precision, quantize=quantize)
        self._base = base
        self._limits = limits or Limits()
        self._engine: Engine | None = None

    # ----------------------------------------------------------------- the protocol

    async def start(self) -> None:
        """Load the base and begin to answer.

        Raises:
            ModelError, ConfigError: it cannot be loaded, or not be served by this engine.
        """
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        base = self._load(self._base) if isinstance(self._base, str) else self._base
        engine = Engine(base, self._limits)
        renderer = Renderer(base.tokenizer)
        self._tokenizer: Any = base.tokenizer
        self._prompts = Prompts(renderer, engine.batch.context, engine.runner.vocabulary)
        self._stop_ids = frozenset(renderer.stop_ids)
        self._grammars = Grammars(base.tokenizer, engine.runner.vocabulary, sorted(self._stop_ids))
        self._texts = TokenTexts(base.tokenizer)
        self._form = find_form(renderer)
        self._control = control_pattern(base.tokenizer)
        engine.start()
        self._engine = engine

    async def stop(self) -> None:
        """End what is being answered, with an error, and let go of the base."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
            self._engine = None

    def chat(self, request: ChatRequest, model: Served) -> AsyncIterator[Item]:
        """Answer a conversation; see Backend."""
        return self._stream(functools.partial(self._chat_rows, request), model)

    def complete(self, request: CompletionRequest, model: Served) -> AsyncIterator[Item]:
        """Go on with a text; see Backend."""
        return self._stream(functools.partial(self._completion_rows, request), model)

    def forget(self, key: str) -> None:
        """An adapter was deleted."""
        if self._engine is not None:
            self._engine.forget(key)

    def health(self) -> dict[str, Any]:
        """Facts for a person who looks."""
        return {"base": self.name, **(self._engine.health() if self._engine is not None else {"starting": True})}

    # ----------------------------------------------------------------- streaming

    async def _stream(self, fill: Callable[[Asked], None], model: Served) -> AsyncIterator[Item]:
        engine = self._running(model)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[list[Item | Exception]]()

        def deliver(items: list[Item | Exception]) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, items)

        asked = Asked(model.key, model.adapter, deliver)
        await asyncio.to_thread(fill, asked)
        engine.submit(asked)
        try:
            while True:
                for item in await queue.get():
                    if isinstance(item, Exception):
                        raise item
                    yield item
                    if isinstance(item, Usage):
                        return
        finally:
            engine.cancel(asked)

    def _running(self, model: Served) -> Engine:
        if self._engine is None:
            raise ApiError(503, "The server is not ready yet. Try again.", type="server_error")
        if model.base != self.name:
            raise ApiError(
                404, f"{model.id} needs the base {model.base}; this server has {self.name} in memory.",
                code="model_not_found", param="model",
            )  # fmt: skip
        return self._engine

    # ----------------------------------------------------------------- requests to rows

    def _chat_rows(self, request: ChatRequest, asked: Asked) -> None:
        mode, only = request.tool_mode
        tools = request.tools if mode != "none" else []
        prompt = self._prompts.chat(request.messages, tools)
        usable = [tool for tool in tools if only is None or tool["function"]["name"] == only]
        forced = mode == "required"
        grammar = self._grammar(request, usable, forced)
        sampling = self._sampling(request, request.top_logprobs if request.logprobs else None)
        names = [tool["function"]["name"] for tool in usable]
        for index in range(request.n):
            reader = None
            if tools:
                reader = ToolReader(self._form, names, forced, request.parallel_tool_calls, self._control)
            own = None if grammar is None else grammar if index == 0 else grammar.copy()
            asked.rows.append(
                Row(
                    asked, index, prompt, Sampler(sampling, index, own),
                    TextStream(Detokenizer(self._decode(control=bool(tools))), request.stop), self._texts,
                    self._most(prompt, request.max_completion_tokens), self._stop_ids, own, reader,
                )
            )  # fmt: skip

    def _grammar(self, request: ChatRequest, tools: Sequence[Mapping[str, Any]], forced: bool) -> Matcher | None:
        """What the answer is held to, if anything."""
        if forced:
            grammar = call_grammar(self._form, tools, self._tokenizer, request.parallel_tool_calls)
            return self._grammars.matcher(grammar, "tools")
        form = request.response_format
        if form.type == "text":
            return None
        given = form.json_schema
        grammar = json_grammar(None, False) if given is None else json_grammar(given.schema_, given.strict)
        return self._grammars.matcher(grammar, "response_format")

    def _completion_rows(self, request: CompletionRequest, asked: Asked) -> None:
        asked.prompts = len(request.prompt)
        sampling = self._sampling(request, request.logprobs)
        for number, given in enumerate(request.prompt):
            prompt = self._prompts.completion(given)
            echo = self._echo(given, prompt, request.logprobs is not None) if request.echo else None
            for choice in range(request.n):
                decode = self._decode(control=False)
                asked.rows.append(
                    Row(
                        asked, number * request.n + choice, prompt, Sampler(sampling, choice),
                        TextStream(Detokenizer(decode, prompt[-SPACE_BEFORE:]), request.stop), self._texts,
                        self._most(prompt, request.max_tokens), self._stop_ids, echo=echo,
                    )
                )  # fmt: skip

    def _echo(self, given: str | Sequence[int], prompt: Sequence[int], scored: bool) -> Echo:
        if isinstance(given, str):
            return Echo(given, len(prompt) - len(self._prompts.renderer.encode_prompt(given)), scored)
        return Echo(self._decode(control=True)(prompt), 0, scored)

    def _most(self, prompt: Sequence[int], wanted: int | None) -> int:
        """The longest answer: what is wanted, as far as the context allows."""
        room = self._prompts.context - len(prompt)
        return room if wanted is None else min(wanted, room)

    def _decode(self, *, control: bool) -> Callable[[Sequence[int]], str]:
        """Token ids → text, with or without control tokens."""
        return functools.partial(self._tokenizer.backend_tokenizer.decode, skip_special_tokens=not control)

    def _sampling(self, request: ChatRequest | CompletionRequest, top_logprobs: int | None) -> Sampling:
        vocabulary = self._grammars.vocabulary
        if unknown := [token for token in request.logit_bias if token >= vocabulary]:
            raise ApiError(
                400, f"Invalid 'logit_bias': there is no token {unknown[0]}; the model has {vocabulary:,} tokens.",
                code="invalid_value", param="logit_bias",
            )  # fmt: skip
        return Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            bias=request.logit_bias,
            top_logprobs=top_logprobs,
        )
