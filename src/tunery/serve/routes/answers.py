"""Answers of chat and plain completions, whole or in chunks, from what an engine yields."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tunery.jsonl import JsonObject
from tunery.serve.engine.backend import TokenDelta, TokenLogprob, ToolCallDelta, Usage
from tunery.serve.schemas import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class ResponseHead:
    """What all chunks of an answer have in common."""

    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str, *weights: str) -> ResponseHead:
        """For a new answer; `weights` name what gave it: program, base and adapter."""
        print_ = hashlib.sha256("\0".join(weights).encode()).hexdigest()[:10]
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model, f"fp_{print_}")

    def body(self, kind: str, choices: list[JsonObject], **more: object) -> JsonObject:
        """An answer, or a chunk of one, of this kind of object."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


def usage_body(usage: Usage) -> JsonObject:
    """`usage`, of both kinds of completions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


class FinishedAnswer:
    """Which choices have ended. If an engine leaves one open, that is a bug, and no client may take it for an end."""

    def __init__(self, choices: int):
        self.open = set(range(choices))
        self.usage: Usage | None = None

    def note(self, delta: TokenDelta) -> None:
        """Take a delta's end into account."""
        if delta.finish_reason is not None:
            self.open.discard(delta.index)

    def require(self) -> Usage:
        """The usage, once all is there.

        Raises:
            RuntimeError: a choice has no end, or there is no usage.
        """
        if self.open or self.usage is None:
            raise RuntimeError(f"the engine stopped with choices {sorted(self.open)} open, usage {self.usage}")
        return self.usage


def whole_choices(
    count: int, deltas: Iterable[TokenDelta], usage: Usage | None
) -> tuple[list[list[TokenDelta]], Usage]:
    """The deltas of each of so many choices, and the usage.

    Raises:
        RuntimeError: a choice has no end, or there is no usage.
    """
    finished = FinishedAnswer(count)
    finished.usage = usage
    parts: defaultdict[int, list[TokenDelta]] = defaultdict(list)
    for delta in deltas:
        finished.note(delta)
        parts[delta.index].append(delta)
    return [parts[index] for index in range(count)], finished.require()


# --------------------------------------------------------------------------- chat


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> JsonObject:
    """`logprobs` of a choice."""
    return {
        "content": [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens],
        "refusal": None,
    }


def _token(token: TokenLogprob) -> JsonObject:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.bytes)}


def chat_body(head: ResponseHead, asked: ChatRequest, deltas: Iterable[TokenDelta], usage: Usage | None) -> JsonObject:
    """A whole answer."""
    choices, counted = whole_choices(asked.n, deltas, usage)
    bodies = [_chat_choice(index, choice, asked.logprobs) for index, choice in enumerate(choices)]
    return head.body("chat.completion", bodies, usage=usage_body(counted))


def _chat_choice(index: int, deltas: Sequence[TokenDelta], logprobs: bool) -> JsonObject:
    text = "".join(delta.text for delta in deltas)
    calls = joined_calls(call for delta in deltas for call in delta.tool_calls)
    message: JsonObject = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs([t for delta in deltas for t in delta.logprobs]) if logprobs else None,
        "finish_reason": next(delta.finish_reason for delta in reversed(deltas) if delta.finish_reason),
    }


def joined_calls(fragments: Iterable[ToolCallDelta]) -> list[JsonObject]:
    """Whole tool calls from their fragments, in order."""
    calls: dict[int, JsonObject] = {}
    for part in fragments:
        call = calls.setdefault(part.index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call["id"] = part.id or call["id"]
        call["function"]["name"] += part.name or ""
        call["function"]["arguments"] += part.arguments
    return [calls[index] for index in sorted(calls)]


class ChatChunks:
    """A streamed answer. The first chunk of each choice has the role; the last one of all may have the usage."""

    def __init__(self, head: ResponseHead, asked: ChatRequest):
        self.head, self.asked = head, asked
        self.finished = FinishedAnswer(asked.n)
        self._begun: set[int] = set()

    def write(self, delta: TokenDelta) -> Iterator[JsonObject]:
        """The chunks of a delta."""
        self.finished.note(delta)
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            opening = {"role": "assistant", "content": None if delta.tool_calls else "", "refusal": None}
            yield self._chunk(delta.index, opening)
        if delta.text or delta.tool_calls or delta.logprobs:
            logprobs = chat_logprobs(delta.logprobs) if self.asked.logprobs else None
            yield self._chunk(delta.index, _chat_delta(delta), logprobs)
        if delta.finish_reason is not None:
            yield self._chunk(delta.index, {}, finish_reason=delta.finish_reason)

    def end(self) -> Iterator[JsonObject]:
        """The chunks after the last delta."""
        usage = self.finished.require()
        if self.asked.include_usage:
            yield self.head.body("chat.completion.chunk", [], usage=usage_body(usage))

    def _chunk(
        self, index: int, delta: JsonObject, logprobs: JsonObject | None = None, finish_reason: str | None = None
    ) -> JsonObject:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        more = {"usage": None} if self.asked.include_usage else {}
        return self.head.body("chat.completion.chunk", [choice], **more)


def _chat_delta(delta: TokenDelta) -> JsonObject:
    result: JsonObject = {}
    if delta.text or not delta.tool_calls:
        result["content"] = delta.text
    if delta.tool_calls:
        result["tool_calls"] = [_call_delta(call) for call in delta.tool_calls]
    return result


def _call_delta(call: ToolCallDelta) -> JsonObject:
    function = {"arguments": call.arguments} if call.name is None else {"name": call.name, "arguments": call.arguments}
    opening = {} if call.id is None else {"id": call.id, "type": "function"}
    return {"index": call.index, **opening, "function": function}


# --------------------------------------------------------------------------- plain completions


def completion_logprobs(tokens: Sequence[TokenLogprob], alternatives: int, start: int) -> JsonObject:
    """`logprobs` of a choice.

    Args:
        alternatives: as asked for with `logprobs`; the chosen token is always among what is shown.
        start: characters of the answer before these tokens.
    """
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token.token)
    shown = [_alternatives(token) for token in tokens]
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": shown if alternatives else None,
        "text_offset": offsets,
    }


def _alternatives(token: TokenLogprob) -> JsonObject | None:
    """None for the first token of an echoed prompt, which nothing predicts."""
    if token.logprob is None:
        return None
    return {other.token: other.logprob for other in token.top} | {token.token: token.logprob}


def completion_body(
    head: ResponseHead, asked: CompletionRequest, deltas: Iterable[TokenDelta], usage: Usage | None
) -> JsonObject:
    """A whole answer."""
    choices, counted = whole_choices(asked.n * len(asked.prompt), deltas, usage)
    bodies = [_completion_choice(index, choice, asked) for index, choice in enumerate(choices)]
    return head.body("text_completion", bodies, usage=usage_body(counted))


def _completion_choice(index: int, deltas: Sequence[TokenDelta], asked: CompletionRequest) -> JsonObject:
    tokens = [token for delta in deltas for token in delta.logprobs]
    return {
        "index": index,
        "text": "".join(delta.text for delta in deltas),
        "logprobs": None if asked.logprobs is None else completion_logprobs(tokens, asked.logprobs, 0),
        "finish_reason": next(delta.finish_reason for delta in reversed(deltas) if delta.finish_reason),
    }


class CompletionChunks:
    """A streamed answer."""

    def __init__(self, head: ResponseHead, asked: CompletionRequest):
        self.head, self.asked = head, asked
        self.finished = FinishedAnswer(asked.n * len(asked.prompt))
        self._written: defaultdict[int, int] = defaultdict(int)

    def write(self, delta: TokenDelta) -> Iterator[JsonObject]:
        """The chunk of a delta."""
        self.finished.note(delta)
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = completion_logprobs(delta.logprobs, self.asked.logprobs, self._written[delta.index])
        self._written[delta.index] += sum(len(token.token) for token in delta.logprobs)
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        more = {"usage": None} if self.asked.include_usage else {}
        yield self.head.body("text_completion", [choice], **more)

    def end(self) -> Iterator[JsonObject]:
        """The chunks after the last delta."""
        usage = self.finished.require()
        if self.asked.include_usage:
            yield self.head.body("text_completion", [], usage=usage_body(usage))
