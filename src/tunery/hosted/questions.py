"""Held-out rows as questions to a model, and labels read from its answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunery.data.example import Example, Message
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import last_text
from tunery.data.prompts import Prompts


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what should follow.

    Attributes:
        where: the row it comes from, "file:line".
        messages: the conversation up to the answer; empty where `prompt` is asked as it stands.
        tools: offered in it.
        reference: the answer in the data; "" if it is not known.
        rejected: the worse of two answers; "" where there is none.
        shown: what a person sees of the question.
        prompt: a text to complete, for models without conversations.
    """

    where: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    reference: str = ""
    rejected: str = ""
    shown: str = ""
    prompt: str = ""

    @property
    def key(self) -> str:
        """Hash of what is asked; the same question has the same one."""
        parts = [list(map(dict, self.messages)), list(self.tools), self.prompt]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def question(example: Example, prompts: Prompts) -> Question | None:
    """The question that an example puts; None where its answer is no text (a tool call)."""
    kind = KINDS[example.kind]
    reference = kind.answer(example)
    if not reference.strip():
        return None
    messages = tuple(map(_unweighted, kind.question(prompts, example)))
    return Question(
        example.where,
        messages,
        tuple(map(dict, example.tools)),
        reference,
        last_text(example.rejected),
        kind.shown(example) or shown(messages),
    )


def questions(examples: Sequence[Example], prompts: Prompts) -> tuple[list[Question], int]:
    """(the questions of held-out examples in their order, how many examples put none)."""
    found = [question(example, prompts) for example in examples]
    asked_ = [one for one in found if one is not None]
    return asked_, len(found) - len(asked_)


def _unweighted(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "weight"}


def shown(messages: Sequence[Message]) -> str:
    """A conversation for reading; a single message of the user stands alone."""
    if len(messages) == 1:
        return str(messages[0].get("content") or "")
    return "\n\n".join(f"{message['role']}: {message.get('content') or '(a tool call)'}" for message in messages)


def read_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer gives: the answer is that label, or names it and no other; else None.

    Case, and punctuation and white space around, do not count, unless labels differ in these only.
    """
    if answer.strip() in labels:
        return answer.strip()
    bare = answer.strip().strip(".,;:!?\"'`*()[] \n\t").casefold()
    exact = [label for label in labels if label.casefold() == bare]
    if exact:
        return exact[0]
    named = [label for label in labels if re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", answer.casefold())]
    # a label that is part of another one named ("good" in "very good") is not named by itself
    whole = [one for one in named if not any(one != other and one.casefold() in other.casefold() for other in named)]
    return whole[0] if len(whole) == 1 else None
