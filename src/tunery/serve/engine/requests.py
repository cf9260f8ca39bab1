"""From requests to rows: prompts, sampling, grammars and readers of tool calls, for one base."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tunery.data.example import Tool
from tunery.data.render import Renderer
from tunery.serve.api_errors import ApiError
from tunery.serve.engine.constrain import Grammars, Matcher, json_grammar
from tunery.serve.engine.detokenizer import Detokenizer, TextStream, TokenTexts
from tunery.serve.engine.prompt_encoder import PromptEncoder
from tunery.serve.engine.running import Asked, Echo, RunningRequest
from tunery.serve.engine.sampling_params import Sampler, SamplingParams
from tunery.serve.engine.tools import ToolReader, call_grammar, control_pattern, find_form

if TYPE_CHECKING:
    from tunery.serve.schemas import ChatRequest, CompletionRequest

SPACE_BEFORE = 6
"""Tokens of a prompt that are decoded with the answer's first, so that its space shows (plain completions)."""


class Requests:
    """Makes rows of requests. May be used from several threads.

    Args:
        tokenizer: of the base, with its chat template.
        context: the most tokens of prompt and answer together.
        vocabulary: number of the model's logits.
    """

    def __init__(self, tokenizer: Any, context: int, vocabulary: int):
        renderer = Renderer(tokenizer)
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._prompts = PromptEncoder(renderer, context, vocabulary)
        self._stop_ids = frozenset(renderer.stop_ids)
        self._grammars = Grammars(tokenizer, vocabulary, sorted(self._stop_ids))
        self._texts = TokenTexts(tokenizer)
        self._form = find_form(renderer)
        self._control = control_pattern(tokenizer)

    def chat(self, request: ChatRequest, asked: Asked) -> None:
        """Add the rows of a conversation to be answered.

        Raises:
            ApiError: 400, it is too long, its template refuses it, or no answer can have the form it asks for.
        """
        mode, only = request.tool_mode
        tools = request.tools if mode != "none" else []
        usable = [tool for tool in tools if only is None or tool["function"]["name"] == only]
        names, forced = [tool["function"]["name"] for tool in usable], mode == "required"
        prompt = self._prompts.chat(request.messages, tools)
        sampling = self._sampling(request, request.top_logprobs if request.logprobs else None)
        grammar = self._grammar(request, usable, forced)
        for index in range(request.n):
            own = None if grammar is None else grammar.copy()
            reader = None
            if tools:
                reader = ToolReader(self._form, names, forced, request.parallel_tool_calls, self._control)
            stream = TextStream(Detokenizer(self._decode(control=bool(tools))), request.stop)
            most = self._most(prompt, request.max_completion_tokens)
            asked.rows.append(
                RunningRequest(
                    asked,
                    index,
                    prompt,
                    Sampler(sampling, index, own),
                    stream,
                    self._texts,
                    most,
                    self._stop_ids,
                    grammar=own,
                    reader=reader,
                )
            )

    def completion(self, request: CompletionRequest, asked: Asked) -> None:
        """Add the rows of texts to go on with.

        Raises:
            ApiError: 400, a prompt is too long, or has tokens that the model does not know.
        """
        asked.prompts = len(request.prompt)
        sampling = self._sampling(request, request.logprobs)
        for number, given in enumerate(request.prompt):
            prompt = self._prompts.completion(given)
            echo = self._echo(given, prompt, request.logprobs is not None) if request.echo else None
            for choice in range(request.n):
                detokenizer = Detokenizer(self._decode(control=False), prompt[-SPACE_BEFORE:])
                most = self._most(prompt, request.max_tokens)
                asked.rows.append(
                    RunningRequest(
                        asked,
                        number * request.n + choice,
                        prompt,
                        Sampler(sampling, choice),
                        TextStream(detokenizer, request.stop),
                        self._texts,
                        most,
                        self._stop_ids,
                        echo=echo,
                    )
                )

    def _grammar(self, request: ChatRequest, tools: Sequence[Tool], forced: bool) -> Matcher | None:
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

    def _sampling(self, request: ChatRequest | CompletionRequest, top_logprobs: int | None) -> SamplingParams:
        if unknown := [token for token in request.logit_bias if token >= self._vocabulary]:
            raise ApiError(
                400,
                f"Invalid 'logit_bias': there is no token {unknown[0]}; the model has {self._vocabulary:,} tokens.",
                code="invalid_value",
                param="logit_bias",
            )
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            bias=request.logit_bias,
            top_logprobs=top_logprobs,
        )
