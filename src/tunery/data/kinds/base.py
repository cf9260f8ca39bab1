"""What a kind of data is. Each kind is one file beside this one, and an entry of tunery.data.kinds.KINDS."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tunery.config import KindName
from tunery.data.example import Example, ExampleFields, Message, Place, Rendered
from tunery.data.kinds.columns import MEANINGS, Meaning
from tunery.data.prompts import Prompts
from tunery.data.row_report import Report, python_list
from tunery.jsonl import JsonMapping, JsonObject, is_list

if TYPE_CHECKING:
    from tunery.data.render import Renderer

Columns = Mapping[str, str]
"""Role (messages, prompt, label, …) → column or key of the file."""

STAND_IN = "–"
"""Stands for an answer that is not there."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A rendered row as tokens, before it is known to fit.

    Attributes:
        ids: the tokens.
        trained: which of them are trained, as long as `ids`.
        desirable: see Rendered.
    """

    ids: list[int]
    trained: list[bool]
    desirable: bool | None = None

    def part(self, start: int, stop: int | None = None) -> Encoded:
        """The tokens [start, stop)."""
        return replace(self, ids=self.ids[start:stop], trained=self.trained[start:stop])


@dataclass(frozen=True, slots=True)
class Fitted:
    """What is left of an example's rows after the length limit.

    Attributes:
        rows: to train on; none if `reason` says why.
        truncated: some tokens were cut off.
        reason: why the example is dropped; "" if it is not.
    """

    rows: Sequence[Encoded] = ()
    truncated: bool = False
    reason: str = ""


class Kind(ABC):
    """How rows of one kind are found in a file, read, rendered, held apart and asked.

    Attributes:
        name: in `data.kind`.
        required, optional: role → column names it usually goes by. The first is ours and wins; two of the others in one
            file are ambiguous. A role is also a setting of `data.columns`.
        meanings: of columns that are refused by name where no role takes them.
        settings: settings of `data` that not every kind has a use for (labels, instruction, system); the others of
            these are refused. A kind that takes `system` renders its messages through `renderer.with_system`.
        plain_text: rows of text files, which have no columns, are of this kind.
        last_resort: taken only where no other kind fits. Among kinds that fit, one whose roles include all of another's
            wins; two others are an error that asks for `data.kind`.
        templated: rows are conversations, put through the model's chat template; else text as it stands.
        pairs: an example becomes two neighbouring rows, the answer to give and the one to avoid.
        noun: what an example is called.
        converses: several turns make one conversation in `tunery chat`; else each line stands for itself.
        chat_hint: what `tunery chat` says first.
        stand_ins: role → what takes the place of an answer that is not there (`parse_question`).
    """

    name: ClassVar[KindName]
    required: ClassVar[Mapping[str, tuple[str, ...]]]
    optional: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    meanings: ClassVar[tuple[Meaning, ...]] = MEANINGS
    settings: ClassVar[tuple[str, ...]] = ()
    plain_text: ClassVar[bool] = False
    last_resort: ClassVar[bool] = False
    templated: ClassVar[bool] = True
    pairs: ClassVar[bool] = False
    noun: ClassVar[str] = "row"
    converses: ClassVar[bool] = False
    chat_hint: ClassVar[str] = "talk to the model."
    stand_ins: ClassVar[Mapping[str, object]] = {}

    # ----------------------------------------------------------------- what it is

    @property
    def roles(self) -> tuple[str, ...]:
        """Everything that a column can be."""
        return (*self.required, *self.optional)

    @property
    def labelled(self) -> bool:
        """Whether rows are classified: each has one of a task's labels, and labels are what is judged."""
        return "labels" in self.settings

    def missing(self, found: Collection[str]) -> list[str]:
        """The roles that must still be filled where those of `found` are."""
        return [role for role in self.required if role not in found]

    def choose(self, found: Columns) -> Columns:
        """The roles that a row has a use for, where columns for all of these were found."""
        return found

    def plausible(self, rows: Sequence[JsonMapping], columns: Columns) -> bool:
        """Whether the values could be of this kind, where columns have the right names.

        Args:
            columns: those that were found: all that are required, and others.
        """
        return True

    # ----------------------------------------------------------------- from a file

    @abstractmethod
    def parse(
        self, report: Report, row: JsonMapping, columns: Columns, labels: Mapping[str, str] | None
    ) -> ExampleFields:
        """The fields of an Example; whatever where `report` is told of a problem.

        Args:
            labels: value in the file → label; None takes the values as they are.
        """

    def parse_question(self, report: Report, row: JsonMapping, columns: Columns) -> ExampleFields:
        """As `parse`, of a row whose answer need not be there; where it is, it does not count."""
        stand_ins = {columns.get(role, role): value for role, value in self.stand_ins.items()}
        return self.parse(report, {**row, **stand_ins}, columns, None)

    def notes(self, train: Sequence[Example]) -> list[str]:
        """What to tell of all training rows together, a sentence each."""
        return []

    def remarks(self, train: Sequence[Example]) -> list[str]:
        """What a person should know of the training rows before trusting them, such as rows that contradict each
        other; without a full stop."""
        return []

    @abstractmethod
    def key(self, example: Example) -> tuple[str, str]:
        """(the input of a row, what stands for it where it is blank): rows of one input are never split apart."""

    # ----------------------------------------------------------------- to the model

    @abstractmethod
    def question(self, prompts: Prompts, example: Example) -> list[Message]:
        """The messages after which the model answers (the last time)."""

    @abstractmethod
    def answer(self, example: Example) -> str:
        """The text of the answer that a model is judged by; "" if it has none (a tool call, running text)."""

    def ask(self, prompts: Prompts, text: str) -> list[Message] | None:
        """How a text is put to a tuned model, as the rows were; None where it stands as it is."""
        return prompts.with_system([{"role": "user", "content": text}])

    def prompt_text(self, example: Example) -> str | None:
        """The text that the model is to go on with; None where it is given messages (`question`)."""
        return None

    @abstractmethod
    def render(self, renderer: Renderer, example: Example) -> list[Rendered]:
        """The rows of an example.

        Raises:
            DataError: the chat template refuses the conversation, or leaves out something that should be trained.
        """

    def fit(
        self, renderer: Renderer, example: Example, rows: Sequence[Encoded], limit: int, too_long: str
    ) -> Iterable[Fitted]:
        """Make an example's rows keep to `limit` tokens, or drop them (`data.too_long`)."""
        for row in rows:
            length = len(row.ids)
            if length <= limit:
                parts, truncated = [row], False
            elif too_long == "drop":
                yield Fitted(reason=f"longer than {limit} tokens ({length})")
                continue
            else:
                parts = self.cut(renderer, example, row, limit)
                truncated = bool(parts) and sum(len(part.ids) for part in parts) < length
            kept = [part for part in parts if any(part.trained[1:])]
            reason = f"its answer alone is longer than {limit} tokens" if length > limit else "it has no trained token"
            yield Fitted(kept, truncated, "" if kept else reason)

    def cut(self, renderer: Renderer, example: Example, row: Encoded, limit: int) -> list[Encoded]:
        """A row that is too long, cut at the front of its prompt; nothing if its last answer alone is too long."""
        ids, trained = row.ids, row.trained
        begin = 1 if ids[0] == renderer.tokenizer.bos_token_id else 0  # the row still starts as every row does
        last = max(index for index, on in enumerate(trained) if on)
        first = last
        while first > 0 and trained[first - 1]:
            first -= 1
        if last + 1 - first + begin >= limit:
            return []
        start = last + 1 - limit + begin
        kept = trained[start : last + 1]
        if trained[start - 1]:  # an earlier answer that lost its beginning is no longer trained
            kept[: kept.index(False)] = [False] * kept.index(False)
        return [replace(row, ids=ids[:begin] + ids[start : last + 1], trained=[False] * begin + kept)]

    def answer_start(self, weights: np.ndarray) -> int:
        """Where a row's last answer starts. weights: float32 [n], as in tunery.data.batching.Row."""
        trained = np.flatnonzero(weights)
        breaks = np.flatnonzero(np.diff(trained) > 1)
        return int(trained[breaks[-1] + 1] if len(breaks) else trained[0])

    @abstractmethod
    def make(self, where: Place, asked: str, answered: str) -> Example:
        """An example with this question and answer, such as one that no file holds."""

    # ----------------------------------------------------------------- to a hosted model

    sent_as: ClassVar[KindName] = "chat"
    """Which of OpenAI's forms `to_openai` writes: a kind in tunery.openai_api.methods."""

    hosted_note: ClassVar[str] = ""
    """What to say of the form in which rows are sent."""

    def hosted_refusal(self) -> tuple[str, str] | None:
        """(why no hosted model takes rows of this kind, what to do instead)."""
        return None

    def hosted_problems(self, example: Example) -> Iterable[str]:
        """Why a hosted model does not take this row."""
        return ()

    def to_openai(self, prompts: Prompts, example: Example) -> JsonObject:
        """The row as a line of OpenAI's fine-tuning files."""
        messages = [*self.question(prompts, example), {"role": "assistant", "content": self.answer(example)}]
        return openai_messages(messages, example)

    def shown(self, example: Example) -> str | None:
        """What a person sees of the question; None for its messages."""
        return None


def without(columns: Columns, *roles: str) -> Columns:
    """Columns without those of some roles."""
    return {role: column for role, column in columns.items() if role not in roles}


def openai_messages(messages: Iterable[Message], example: Example) -> JsonObject:
    """Messages and tools as OpenAI's files write them."""
    return {"messages": plain_calls(messages), **({"tools": list(example.tools)} if example.tools else {})}


def plain_calls(messages: Iterable[Message]) -> list[JsonObject]:
    """Messages as OpenAI writes them: content is null beside tool calls."""
    return [
        {**message, "content": None} if message.get("tool_calls") and not message.get("content") else dict(message)
        for message in messages
    ]


def with_stand_in(row: JsonMapping, key: str) -> JsonMapping:
    """A row whose conversation, under a key, ends with something that the assistant says."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = python_list(value)
            if value is None:  # reading the row says so
                return row
    return {**row, key: [*value, {"role": "assistant", "content": STAND_IN}]} if is_list(value) and value else row


def last_text(messages: Sequence[Message]) -> str:
    """The text of the last message; "" if it calls a tool."""
    if not messages or messages[-1].get("tool_calls"):
        return ""
    return messages[-1].get("content") or ""


def said_by_user(messages: Iterable[Message]) -> str:
    """All that the user says in a conversation."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def all_said(messages: Iterable[Message]) -> str:
    """All that is said in a conversation."""
    return "\n".join(message["content"] for message in messages)
