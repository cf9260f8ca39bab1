"""Held-out rows as questions to a model, and labels read from its answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunery.data.example import Example, Message
from tunery.data.wording import Wording
from tunery.hosted.convert import asked


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what should follow.

    Attributes:
        where: the row it comes from, "file:line".
        messages: the conversation up to the answer; empty where `prompt` is asked as it stands.
        tools: offered in it.
        reference: the answer in the data; "" if it is not known.
        rejected: kind preference: the worse answer.
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


def question(example: Example, wording: Wording) -> Question | None:
    """The question that an example puts; None where its answer is no text (a tool call)."""
    reference = {
        "classification": example.label,
        "completion": example.completion,
        "chat": _text(example.messages),
        "preference": _text(example.chosen),
    }[example.kind]
    if not reference.strip():
        return None
    messages = tuple(map(_unweighted, asked(example, wording)))
    return Question(
        example.where,
        messages,
        tuple(map(dict, example.tools)),
        reference,
        _text(example.rejected),
        example.text if example.kind == "classification" else shown(messages),
    )


def questions(examples: Sequence[Example], wording: Wording) -> tuple[list[Question], int]:
    """(the questions of held-out examples in their order, how many examples put none)."""
    found = [question(example, wording) for example in examples]
    asked_ = [one for one in found if one is not None]
    return asked_, len(found) - len(asked_)


def _text(messages: Sequence[Message]) -> str:
    if not messages or messages[-1].get("tool_calls"):
        return ""
    return messages[-1].get("content") or ""


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
