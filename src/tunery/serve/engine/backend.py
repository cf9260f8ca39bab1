"""What the routes call, whether the built-in engine answers or a server elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from tunery.serve.api_errors import ApiError, Busy

if TYPE_CHECKING:
    from tunery.serve.schemas import ChatRequest, CompletionRequest

__all__ = [
    "ApiError",
    "Backend",
    "Busy",
    "FinishReason",
    "Item",
    "Served",
    "TokenDelta",
    "TokenLogprob",
    "ToolCallDelta",
    "Usage",
]

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and how likely the model held it, before temperature, penalties and grammar changed anything.

    Attributes:
        token: its text; bytes that are not a character by themselves show as U+FFFD.
        logprob: natural logarithm; None for the first token of an echoed prompt, which nothing predicts.
        bytes: of the token in UTF-8.
        top: the most likely tokens at this place, best first.
    """

    token: str
    logprob: float | None
    bytes: tuple[int, ...]
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A call of a function, or a further fragment of its arguments (then `id` and `name` are None)."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """One item of the stream of a request.

    Attributes:
        index: of the choice.
        finish_reason: on the last item of a choice.
    """

    index: int
    text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, all its choices together; the last item of a stream.

    Attributes:
        cached_tokens: of the prompts' tokens those whose keys and values had been computed before.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


Item = TokenDelta | Usage


class Served(Protocol):
    """The part of the registry's ServedModel that answers need."""

    @property
    def id(self) -> str:
        """The name a client uses."""
        ...

    @property
    def base(self) -> str:
        """What Task.model names."""
        ...

    @property
    def adapter(self) -> Path | None:
        """A folder in PEFT's format; None for the base alone."""
        ...

    @property
    def key(self) -> str:
        """Names the adapter's weights for good; "" for the base alone."""
        ...


class Backend(Protocol):
    """Whatever answers requests.

    `chat` and `complete` are asynchronous generators. Closing one cancels what it started. Before their first item
    they raise ApiError for a request that cannot be answered, and Busy when there is no room in the queue.
    """

    async def start(self) -> None:
        """Get ready: load the base, or see that the other server answers."""
        ...

    async def stop(self) -> None:
        """End what is being answered, and let go of everything."""
        ...

    def chat(self, request: ChatRequest, model: Served) -> AsyncIterator[Item]:
        """Answer a conversation."""
        ...

    def complete(self, request: CompletionRequest, model: Served) -> AsyncIterator[Item]:
        """Go on with a text."""
        ...

    def forget(self, key: str) -> None:
        """An adapter was deleted: drop what is kept of it."""
        ...

    def health(self) -> dict[str, object]:
        """Facts for a person who looks."""
        ...
