"""What a model is told besides a row's own words: the same whichever model it goes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tunery.data.example import Message

LABEL_JOIN = "\n\n"
"""Stands between the instruction and the text of a classification row."""


class Prompts:
    """Puts texts into messages.

    Args:
        labels: of a classification task, in order.
        instruction: classification; None writes one that lists the labels.
        system: put before conversations that have no system message.
    """

    def __init__(self, *, labels: Sequence[str] = (), instruction: str | None = None, system: str | None = None):
        self.labels = tuple(labels)
        self.instruction = instruction if instruction is not None else _default_instruction(labels)
        self.system = system

    def label_question(self, text: str) -> list[Message]:
        """The messages that ask for the label of `text`."""
        content = f"{self.instruction}{LABEL_JOIN}{text}" if self.instruction else text
        return self.with_system([{"role": "user", "content": content}])

    def with_system(self, messages: Iterable[Message]) -> list[Message]:
        """The conversation with the task's system message in front, unless it has one."""
        messages = list(messages)
        if self.system and (not messages or messages[0]["role"] not in ("system", "developer")):
            return [{"role": "system", "content": self.system}, *messages]
        return messages


def _default_instruction(labels: Sequence[str]) -> str:
    return f"Classify the text. Answer with one of: {', '.join(labels)}." if labels else ""
