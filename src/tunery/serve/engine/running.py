"""A row: one choice of one request, from its prompt to its last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunery.inference.adapter_cache import Adapter
from tunery.inference.kv_cache import Slot
from tunery.serve.engine.backend import FinishReason, Item, TokenDelta, TokenLogprob, Usage
from tunery.serve.engine.constrain import Matcher
from tunery.serve.engine.detokenizer import TextDelta, TextStream, TokenTexts
from tunery.serve.engine.sampling_params import Choice, Sampler
from tunery.serve.engine.tools import ToolReader


@dataclass(frozen=True)
class Echo:
    """The prompt given back in front of an answer.

    Attributes:
        start: its first token that is given back; before it stands what the tokenizer put in front.
        scored: with the log-probability of each token.
    """

    text: str
    start: int
    scored: bool


@dataclass(eq=False)
class RunningRequest:
    """One choice.

    Attributes:
        index: of the choice.
        prompt: token ids.
        most: longest answer, in tokens.
        stop_ids: tokens that end the answer and are not part of it.
        tokens: prompt and answer so far.
        computed: so many of them stand in the cache.
        kept: so many blocks of them are in the prefix store.
        cached: of the prompt's tokens those found in the prefix store; None before that was looked up.
        since: when it came, by the monotonic clock.
    """

    asked: Asked
    index: int
    prompt: Sequence[int]
    sampler: Sampler
    stream: TextStream
    texts: TokenTexts
    most: int
    stop_ids: frozenset[int]
    grammar: Matcher | None = None
    reader: ToolReader | None = None
    echo: Echo | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    kept: int = 0
    names: list[bytes] | None = None
    place: Slot | None = None
    adapter: Adapter | None = None
    cached: int | None = None
    since: float = 0.0
    _scored: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def scoring(self) -> bool:
        """The prompt's own logits are wanted, so all of it is computed."""
        return self.echo is not None and self.echo.scored and self.computed < len(self.prompt)

    def begin(self) -> list[TokenDelta]:
        """What can be sent before anything is computed; ends the row if that is all."""
        if self.echo is None or self.echo.scored:
            return []
        return [TokenDelta(self.index, self.echo.text, finish_reason=None if self.most else "length")]

    def score(self, choices: Sequence[Choice]) -> list[TokenDelta]:
        """Further tokens of the prompt, scored; those of the echo are sent when all are there."""
        assert self.echo is not None
        if not self._scored:
            self._scored = [self.texts.logprob(self.prompt[0], None)]
        self._scored += [self.texts.logprob(choice.token, choice.logprob, choice.top) for choice in choices]
        if len(self._scored) < len(self.prompt):
            return []
        tokens = tuple(self._scored[self.echo.start :])
        return [TokenDelta(self.index, self.echo.text, logprobs=tokens, finish_reason=None if self.most else "length")]

    def advance(self, choice: Choice) -> list[TokenDelta]:
        """The answer goes on with a token. The last delta of the row carries its finish_reason."""
        token = choice.token
        self.tokens.append(token)
        if token in self.stop_ids:
            return self._finish(TextDelta(), "stop")
        self.sampler.note(token)
        if self.grammar is not None:
            self.grammar.accept(token)
        told = choice.logprob is not None
        shown = self.texts.logprob(token, choice.logprob, choice.top) if told else None
        piece = self.stream.push(token, shown)
        if self.stream.stopped or (self.grammar is not None and self.grammar.done):
            return self._finish(piece, "stop")
        if self.answered >= self.most:
            return self._finish(piece, "length")
        text = self.reader.feed(piece.text) if self.reader else piece.text
        return [TokenDelta(self.index, text, logprobs=piece.logprobs)] if text or piece.logprobs else []

    def _finish(self, piece: TextDelta, reason: FinishReason) -> list[TokenDelta]:
        rest = self.stream.end()
        if self.stream.stopped:
            reason = "stop"
        text, logprobs = piece.text + rest.text, piece.logprobs + rest.logprobs
        if self.reader is None:
            return [TokenDelta(self.index, text, logprobs=logprobs, finish_reason=reason)]
        said = self.reader.feed(text)
        more, calls = self.reader.end()
        if calls and reason == "stop":
            reason = "tool_calls"
        return [TokenDelta(self.index, said + more, tuple(calls), logprobs, reason)]


@dataclass(eq=False)
class Asked:
    """A request.

    Attributes:
        key, folder: of its adapter; "" and None for the base.
        deliver: takes its items, or the exception that ends it; called in the engine's thread, and must not wait.
        prompts: their number; the rows are numbered prompt by prompt.
        cancelled: nobody waits for it any more.
    """

    key: str
    folder: Path | None
    deliver: Callable[[list[Item | Exception]], None]
    prompts: int = 1
    rows: list[RunningRequest] = field(default_factory=list)
    cancelled: bool = False
    open: int = 0

    def usage(self) -> Usage:
        """Its tokens; each prompt counts once, however many choices it has."""
        firsts = self.rows[:: len(self.rows) // self.prompts]
        return Usage(
            prompt_tokens=sum(len(row.prompt) for row in firsts),
            completion_tokens=sum(row.answered for row in self.rows),
            cached_tokens=sum(row.cached or 0 for row in firsts),
        )
