"""One renderer from rows to tokens. Training, evaluation, chat, serving and exports all use it.

Which tokens are trained follows from spans of the rendered conversation, never from searching the text: an answer
starts where the template's own generation prompt ends, and ends with the end-of-turn token, which is trained too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tunery.data.example import Example, Message, Rendered, Tool
from tunery.data.kinds import KINDS
from tunery.data.messages import plain_message
from tunery.data.prompts import Prompts
from tunery.errors import DataError
from tunery.jsonl import JsonObject
from tunery.paths import text_sha256
from tunery.text import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Tokenizer(Protocol):
    """The types of what transformers leaves without one in its tokenizers."""

    @property
    def chat_template(self) -> str | Mapping[str, str] | None: ...

    def decode(self, token_ids: list[int], /) -> str | list[str]: ...


@dataclass
class Remarks:
    """What rendering noticed, counted over all rows; each is a sentence for the user."""

    counts: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, sentence: str) -> None:
        """Count one more row for which `sentence` is true."""
        self.counts[sentence] = self.counts.get(sentence, 0) + 1

    def add_all(self, counts: Mapping[str, int]) -> None:
        """Add the counts of rows that were rendered at another time."""
        for sentence, count in counts.items():
            self.counts[sentence] = self.counts.get(sentence, 0) + count

    def since(self, before: Mapping[str, int]) -> dict[str, int]:
        """What was counted since `counts` was `before`."""
        return {s: count - before.get(s, 0) for s, count in self.counts.items() if count > before.get(s, 0)}

    def sentences(self) -> list[str]:
        """Each remark with its number of rows."""
        return [f"{sentence} ({plural(count, 'row')})" for sentence, count in self.counts.items()]


class Renderer(Prompts):
    """Turns examples into text with trained spans, through the tokenizer's chat template.

    Args:
        tokenizer: with a chat template for the kinds chat and classification.
        labels: of a classification task, in order.
        instruction: classification; None writes one that lists the labels.
        system: put before conversations that have no system message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str] = (),
        instruction: str | None = None,
        system: str | None = None,
    ):
        super().__init__(labels=labels, instruction=instruction, system=system)
        self.tokenizer = tokenizer
        self.remarks = Remarks()
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
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            self.plain(messages),
            tools=[dict(tool) for tool in tools] or None,  # type: ignore[arg-type]
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )

    # ----------------------------------------------------------------- rows

    def render(self, example: Example) -> list[Rendered]:
        """The rows of an example: one, or one a trained turn where the template rewrites earlier turns; of a pair of
        answers two, with the chosen and with the rejected one.

        Raises:
            DataError: the chat template refuses the conversation, or leaves out something that should be trained.
        """
        kind = KINDS[example.kind]
        if not kind.templated:
            return kind.render(self, example)
        self._remark_control_tokens(example)
        with _template_errors(example.where):
            return kind.render(self, example)

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
        messages = list(messages)
        trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
        whole = self._template(messages[: trained[-1] + 1], tools)
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

    def _answer_span(self, messages: list[Message], turn: int, tools: Sequence[Tool], upto: str) -> tuple[int, int]:
        """Where the answer of message `turn` stands in `upto`, the conversation rendered up to and with it."""
        prompt = self._template(messages[:turn], tools, add_generation_prompt=True)
        start = _common_length(prompt, upto)
        if start < len(prompt):
            if start < _common_length(self._template(messages[:turn], tools) if turn else "", upto):
                raise DataError("the model's chat template changes earlier messages when an answer follows")
            self.remarks.add("the template's generation prompt differs from what it writes before an answer")
        self._check_rendered(messages[turn], upto[start:], tools, prompt)
        specials = list(self._special.finditer(upto, start)) if self._special else []
        if specials and not upto[specials[-1].end() :].strip():
            return start, specials[-1].end()
        self.remarks.add("the template writes no end-of-turn token after an answer, so none is trained")
        return start, len(upto)

    def _check_rendered(self, message: Message, answer: str, tools: Sequence[Tool], prompt: str) -> None:
        for call in message.get("tool_calls") or ():
            if call["function"]["name"] not in answer:
                raise DataError(
                    f"the model's chat template leaves out the call of {call['function']['name']}",
                    "choose a model whose template knows tool calls, or write the call into the content",
                )
        content = message.get("content")
        if isinstance(content, str) and content.strip() and content.strip()[-20:] not in answer:
            raise DataError("the model's chat template leaves out the assistant's content")
        if any(tool.get("function", {}).get("name", "") not in prompt for tool in tools):
            self.remarks.add("the chat template does not show the tools to the model")

    def _remark_control_tokens(self, example: Example) -> None:
        messages = (*example.messages, *example.chosen, *example.rejected)
        texts = [example.text, *(m.get("content") or "" for m in messages)]
        if self._special and any(self._special.search(text) for text in texts):
            self.remarks.add("the text holds control tokens of the model (such as its end-of-turn token)")

    # ----------------------------------------------------------------- tokens

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
        """Token ids, and which of them are trained, of each row.

        A row is tokenised as a whole when that leaves every prompt as it will be tokenised when the model is asked;
        where a token would straddle the border, the parts are tokenised one by one.
        """
        wholes = self._encode_texts([row.text for row in rendered], offsets=True)
        prompts = [(index, start) for index, row in enumerate(rendered) for start, _ in row.spans if start > 0]
        asked = self._encode_texts([rendered[index].text[:start] for index, start in prompts])
        clean = [True] * len(rendered)
        for (index, _), (ids, _) in zip(prompts, asked, strict=True):
            clean[index] &= wholes[index][0][: len(ids)] == ids
        first = self._first_tokens()
        last = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]  # type: ignore[arg-type]
        result: list[tuple[list[int], list[bool]]] = []
        for row, (ids, offsets), is_clean in zip(rendered, wholes, clean, strict=True):
            if is_clean:
                trained = _starts_within(offsets, row.spans)
            else:
                ids, trained = self._encode_parts(row)
            front, back = (first if row.begin else []), (last if row.end else [])
            result.append(([*front, *ids, *back], [False] * len(front) + trained + [True] * len(back)))
        return result

    def _encode_parts(self, row: Rendered) -> tuple[list[int], list[bool]]:
        borders = sorted({0, len(row.text), *(place for span in row.spans for place in span)})
        ids: list[int] = []
        trained: list[bool] = []
        for low, high in itertools.pairwise(borders):
            part = self._encode_texts([row.text[low:high]])[0][0]
            ids += part
            trained += [any(a <= low < b for a, b in row.spans)] * len(part)
        return ids, trained

    def _encode_texts(
        self, texts: Sequence[str], *, offsets: bool = False
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not texts:
            return []
        out = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
        ids: list[list[int]] = out["input_ids"]  # type: ignore[assignment]
        spans: list[list[tuple[int, int]]] = out["offset_mapping"] if offsets else [[] for _ in ids]
        return list(zip(ids, spans, strict=True))  # type: ignore[arg-type]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of a text stands, as (start, end) in characters."""
        return self._encode_texts([text], offsets=True)[0][1]

    def encode_prompt(self, text: str, *, begin: bool = False) -> list[int]:
        """Token ids of a prompt; `begin` as in Rendered."""
        return [*(self._first_tokens() if begin else []), *self._encode_texts([text])[0][0]]

    def _first_tokens(self) -> list[int]:
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        return list(full[: _find(full, bare)])  # type: ignore[arg-type, index]

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
    except Exception as error:
        if not (type(error).__module__.startswith("jinja2") or isinstance(error, (TypeError, ValueError, KeyError))):
            raise
        raise DataError(
            f"{where}: the model's chat template refuses this conversation: {error}",
            "templates often want user and assistant to take turns, the user first; some take no system message",
        ) from error


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches any control token of the tokenizer in a text."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]  # type: ignore[attr-defined]
    names = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def _starts_within(offsets: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> list[bool]:
    """Which tokens start inside one of the spans."""
    starts = np.fromiter((start for start, _ in offsets), np.int64, len(offsets))
    inside = np.zeros(len(starts), bool)
    for low, high in spans:
        inside |= (low <= starts) & (starts < high)
    return inside.tolist()


def _common_length(a: str, b: str) -> int:
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def _find(whole: Sequence[int], part: Sequence[int]) -> int:
    return next((i for i in range(len(whole)) if list(whole[i : i + len(part)]) == list(part)), 0)
