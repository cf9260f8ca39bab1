"""One renderer from rows to tokens. Training, evaluation, chat, serving and exports all use it.

Which tokens are trained follows from spans of the rendered conversation, never from searching the text: an answer
starts where the template's own generation prompt ends, and ends with the end-of-turn token, which is trained too.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tunery.data.dated_template import dated_template, writes_date
from tunery.data.example import Example, Message, Rendered, Tool
from tunery.data.kinds import KINDS
from tunery.data.messages import plain_message
from tunery.data.prompts import Prompts
from tunery.data.remarks import Remarks, about_calls, about_left_out, holds_control_tokens
from tunery.data.row_tokens import encode_rows
from tunery.data.tokens import TextEncoder
from tunery.errors import DataError
from tunery.jsonl import JsonObject
from tunery.paths import text_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONG_CONVERSATION = 8
"""Answers in a conversation beyond which they are first looked for in parts of it."""

MOST_ANSWERS = 500
"""Answers in a conversation where each must be rendered with all that stands before it."""

_OPENED_THOUGHT = re.compile(r"<think>\s*$")


class _Tokenizer(Protocol):
    """The types of what transformers leaves without one in its tokenizers."""

    @property
    def chat_template(self) -> str | Mapping[str, str] | None: ...

    def decode(self, token_ids: list[int], /) -> str | list[str]: ...


class Renderer(Prompts):
    """Turns examples into text with trained spans, through the tokenizer's chat template.

    Args:
        tokenizer: with a chat template for the kinds chat and classification.
        labels: of a classification task, in order.
        instruction: classification; None writes one that lists the labels.
        system: put before conversations that have no system message.
        date: the day that a template which writes the date is told; None for today, whenever that is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str] = (),
        instruction: str | None = None,
        system: str | None = None,
        date: datetime.date | None = None,
    ):
        super().__init__(labels=labels, instruction=instruction, system=system)
        self.tokenizer = tokenizer
        self.date = date if writes_date(tokenizer) else None
        self.remarks = Remarks()
        self._encode = TextEncoder(tokenizer)
        self._noticed: dict[str, None] = {}
        self._special = _special_pattern(tokenizer)

    @property
    def template_sha256(self) -> str:
        """Hash of the chat template; it travels with the adapter and is compared when a run is loaded."""
        return text_sha256(str(_chat_template(self.tokenizer) or ""))

    @functools.cached_property
    def tokenizer_sha256(self) -> str:
        """Hash of all that decides how the tokenizer splits a text and which tokens it puts around one."""
        tokenizer = self.tokenizer
        facts = [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]  # type: ignore[attr-defined]
        return text_sha256(json.dumps(facts, default=str, sort_keys=True))

    # ----------------------------------------------------------------- conversations

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The text after which the model answers, for messages and tools in OpenAI's form (as in a row, or a request).

        Raises:
            DataError: the chat template refuses the conversation.
        """
        with _template_errors("the conversation"):
            return self._template(messages, tools, add_generation_prompt=True)

    def plain(self, messages: Iterable[Message]) -> list[JsonObject]:
        """Messages as the chat template gets them."""
        knows_developer = "developer" in str(_chat_template(self.tokenizer))
        return [plain_message(message, knows_developer) for message in messages]

    def _template(self, messages: Sequence[Message], tools: Sequence[Tool], add_generation_prompt: bool = False) -> str:
        listed: list[Any] | None = [dict(tool) for tool in tools] or None
        dated: dict[str, Any] = {}
        if self.date is not None:
            dated = dated_template(self.tokenizer, listed, self.date)
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            self.plain(messages),
            tools=listed,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **dated,
        )

    # ----------------------------------------------------------------- rows

    def render(self, example: Example) -> list[Rendered]:
        """The rows of an example: one, or one a trained turn where the template rewrites earlier turns; of a pair of
        answers two, with the chosen and with the rejected one.

        Raises:
            DataError: the chat template refuses the conversation, or leaves out something that should be trained.
        """
        kind = KINDS[example.kind]
        self._noticed = {}
        if holds_control_tokens(example, self._special):
            self._notice("the text holds control tokens of the model (such as its end-of-turn token)")
        if kind.templated:
            self._notice(*about_calls(example))
            if self.date is not None:
                self._notice(f"the chat template writes a date, which is {self.date} throughout (data.date)")
        with _template_errors(example.where) if kind.templated else contextlib.nullcontext():
            rows = kind.render(self, example)
        for sentence in self._noticed:
            self.remarks.add(sentence)
        return rows

    def _notice(self, *sentences: str) -> None:
        """Remarks on the row that is being rendered."""
        self._noticed.update(dict.fromkeys(sentences))

    def render_answer(
        self,
        messages: Sequence[Message],
        answer: Sequence[Message],
        tools: Sequence[Tool],
        desirable: bool,
    ) -> Rendered:
        """A conversation that ends with an answer; only that is trained."""
        shown = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]
        rows = self.render_conversation([*shown, *answer], tools)
        if len(rows) > 1:
            raise DataError(
                "the model's chat template rewrites the earlier messages of an answer when a later one follows",
                "give an answer with a single assistant message",
            )
        return replace(rows[0], desirable=desirable)

    def render_conversation(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Rendered]:
        """A conversation whose assistant messages are trained, but for those with weight 0."""
        messages = [self._with_opened_thought(message) for message in messages]
        trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
        whole = self._template(messages[: trained[-1] + 1], tools)
        self._notice(*about_left_out(messages[: trained[-1] + 1], whole))
        if len(trained) > LONG_CONVERSATION:
            spans = self._spans_by_stretches(messages, trained, tools, whole)
            if spans is not None:
                return [Rendered(whole, tuple(spans))]
            if len(trained) > MOST_ANSWERS:
                raise DataError(
                    f"{len(trained):,} answers in one conversation are too many for this model's chat template, which "
                    f"changes earlier messages when others follow (at most {MOST_ANSWERS:,})",
                    "cut the conversation into several rows",
                )
        together: list[tuple[int, int]] = []
        rows: list[Rendered] = []
        for turn in trained:
            upto = whole if turn == trained[-1] else self._template(messages[: turn + 1], tools)
            start, end = self._answer_span(messages, turn, tools, upto)
            if whole.startswith(upto[:end]):
                together.append((start, end))
            else:  # e.g. templates that drop the reasoning of earlier turns
                rows.append(Rendered(upto, ((start, end),)))
        return [*rows, Rendered(whole, tuple(together))]

    def _spans_by_stretches(
        self, messages: list[Message], trained: list[int], tools: Sequence[Tool], whole: str
    ) -> list[tuple[int, int]] | None:
        """The spans of all answers, each found in a rendering of the messages since the answer before it: as many
        renderings as answers, but short ones. None where the renderings do not make up the whole, because the template
        writes a message in another way when others stand before or after it."""
        opening = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), 0)
        head, borders = messages[:opening], [opening, *(turn + 1 for turn in trained)]
        spans: list[tuple[int, int]] = []
        place = repeated = 0
        try:
            for number, (low, high) in enumerate(itertools.pairwise(borders)):
                stretch = [*head, *messages[low:high]]
                text = self._template(stretch, tools)
                if number == 1:  # what every stretch repeats of the beginning
                    repeated = len(text) + place - len(self._template(messages[:high], tools))
                if repeated < 0 or not whole.startswith(text[repeated:], place):
                    return None
                start, end = self._answer_span(stretch, len(stretch) - 1, tools, text)
                if start < repeated:
                    return None
                spans.append((start - repeated + place, end - repeated + place))
                place += len(text) - repeated
        except Exception:  # a template may refuse a stretch for want of what stood before it
            return None
        return spans if place == len(whole) else None

    def _answer_span(self, messages: list[Message], turn: int, tools: Sequence[Tool], upto: str) -> tuple[int, int]:
        """Where the answer of message `turn` stands in `upto`, the conversation rendered up to and with it."""
        prompt = self._template(messages[:turn], tools, add_generation_prompt=True)
        start = common_length(prompt, upto)
        asked = ""
        if start < len(prompt) or self.thought_opening:
            asked = self._template(messages[:turn], tools) if turn else ""
        if start < len(prompt):
            if start < common_length(asked, upto):
                raise DataError("the model's chat template changes earlier messages when an answer follows")
            self._notice(
                f"the template's generation prompt ends with {prompt[start:]!r}, and this answer begins without it"
            )
        opened = upto[common_length(asked, upto) if asked else start : start]
        self._check_rendered(messages[turn], opened, upto[start:], tools, prompt)
        specials = list(self._special.finditer(upto, start)) if self._special else []
        if specials and not upto[specials[-1].end() :].strip():
            return start, specials[-1].end()
        self._notice("the template writes no end-of-turn token after an answer, so none is trained")
        return start, len(upto)

    @functools.cached_property
    def thought_opening(self) -> str:
        """What the generation prompt ends with where it opens the model's thoughts, such as "<think>\n"; else ""."""
        try:
            prompt = self._template([{"role": "user", "content": "q"}], (), add_generation_prompt=True)
        except Exception:  # one that wants more than a question
            return ""
        found = _OPENED_THOUGHT.search(prompt)
        return found.group() if found else ""

    def _with_opened_thought(self, message: Message) -> Message:
        """An answer whose thoughts are closed but not opened, because the generation prompt opens them, made whole."""
        content = message.get("content")
        if message["role"] != "assistant" or not isinstance(content, str) or not self.thought_opening:
            return message
        if "</think>" not in content or "<think>" in content:
            return message
        return {**message, "content": self.thought_opening + content}

    # ----------------------------------------------------------------- what a template leaves out

    def _check_rendered(self, message: Message, opened: str, answer: str, tools: Sequence[Tool], prompt: str) -> None:
        """Refuse an answer that the template does not write, and remark on what it leaves out.

        Args:
            opened: what of the answer the generation prompt has already written.
        """
        for call in message.get("tool_calls") or ():
            if call["function"]["name"] not in answer:
                raise DataError(
                    f"the model's chat template leaves out the call of {call['function']['name']}",
                    "choose a model whose template knows tool calls, or write the call into the content",
                )
        written = _packed(opened + answer)
        content = _packed(message.get("content") or "")
        said = content.rpartition("</think>")[2] or content
        if said and said[-20:] not in written:
            raise DataError("the model's chat template leaves out the assistant's content")
        if content and content[:20] not in written:
            self._notice("the chat template leaves out the beginning of an answer, such as its thoughts")
        thoughts = _packed(message.get("reasoning_content") or "")
        if thoughts and thoughts[-20:] not in written:
            self._notice("the chat template leaves out reasoning_content")
        if any(tool.get("function", {}).get("name", "") not in prompt for tool in tools):
            self._notice("the chat template does not show the tools to the model")

    # ----------------------------------------------------------------- tokens

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
        """Token ids, and which of them are trained, of each row (see tunery.data.row_tokens)."""
        last = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]  # type: ignore[arg-type]
        return encode_rows(rendered, self._encode, self._special, last)

    def token_starts(self, text: str) -> np.ndarray:
        """int64 [n]: where each token of a text begins, in characters."""
        return self._encode([text])[0].starts

    def encode_prompt(self, text: str, *, begin: bool = False) -> list[int]:
        """Token ids of a prompt; `begin` as in Rendered."""
        return [*(self._encode.first_tokens() if begin else []), *self._encode([text])[0].ids]

    @property
    def end_of_turn(self) -> int | None:
        """The token with which the template ends an answer, found by rendering one; None if it writes none."""
        if not _chat_template(self.tokenizer):
            return None
        for opening in ([], [{"role": "system", "content": "s"}]):
            messages = [*opening, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
            try:
                text = self._template(messages, ())
            except Exception:
                continue
            found = list(self._special.finditer(text, text.rfind("a"))) if self._special else []
            return self.tokenizer.convert_tokens_to_ids(found[-1].group()) if found else None  # type: ignore[return-value]
        return None

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the end-of-turn token and the tokenizer's end-of-sequence token."""
        ids = [self.end_of_turn, self.tokenizer.eos_token_id]
        return sorted({int(i) for i in ids if i is not None})  # type: ignore[arg-type]


def decode(tokenizer: _Tokenizer, ids: list[int]) -> str:
    """The text of tokens."""
    return str(tokenizer.decode(ids))


def _chat_template(tokenizer: _Tokenizer) -> str | Mapping[str, str] | None:
    return tokenizer.chat_template


@contextlib.contextmanager
def _template_errors(where: str) -> Generator[None]:
    """What a chat template raises, in words and with the row it was about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error.message}", error.hint) from None
    except RecursionError:
        raise DataError(f"{where}: a tool, a call or an answer is nested too deeply", "make it flatter") from None
    except Exception as error:
        if not (type(error).__module__.startswith("jinja2") or isinstance(error, (TypeError, ValueError, KeyError))):
            raise
        raise DataError(
            f"{where}: the model's chat template refuses this conversation: {error}",
            "templates often want user and assistant to take turns, the user first; some take no system message",
        ) from error


def _packed(text: str) -> str:
    """A text without its white space, which templates are free with."""
    return "".join(text.split())


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches any control token of the tokenizer in a text."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]  # type: ignore[attr-defined]
    names = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def common_length(a: str, b: str) -> int:
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
