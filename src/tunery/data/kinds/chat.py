"""Conversations: `messages` in OpenAI's form, and `tools` where there are some."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from tunery.data.conversation import Report, read_conversation
from tunery.data.example import Example, ExampleFields, Message, Place, Rendered
from tunery.data.kinds.base import (
    Columns,
    Kind,
    all_said,
    last_text,
    openai_messages,
    said_by_user,
    with_stand_in,
)
from tunery.data.prompts import Prompts
from tunery.jsonl import JsonMapping, JsonObject

if TYPE_CHECKING:
    from tunery.data.render import Renderer

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")

NOT_HOSTED = ("reasoning_content",)
"""Keys of a message that hosted models do not take."""


class Chat(Kind):
    """See the module."""

    name = "chat"
    required: ClassVar = {"messages": MESSAGE_COLUMNS}
    optional: ClassVar = {"tools": ("tools",)}
    settings = ("system",)
    converses = True

    def parse(
        self, report: Report, row: JsonMapping, columns: Columns, labels: Mapping[str, str] | None
    ) -> ExampleFields:
        return read_conversation(report, row, columns)

    def parse_question(self, report: Report, row: JsonMapping, columns: Columns) -> ExampleFields:
        fields = self.parse(report, with_stand_in(row, columns["messages"]), columns, None)
        *asked, stand_in = fields.get("messages") or ({},)
        if asked and asked[-1].get("role") == "assistant":  # the row's own answer
            asked.pop()
        if not asked and not report.problems:
            report.add(columns["messages"], "there is nothing to answer", "put what the user says before the answer")
        return {**fields, "messages": (*asked, stand_in)}

    def shortened(self, example: Example, row: JsonMapping, columns: Columns) -> bool:
        messages = row[columns["messages"]]
        return len(example.messages) < len(json.loads(messages) if isinstance(messages, str) else messages)

    def key(self, example: Example) -> tuple[str, str]:
        return said_by_user(example.messages), all_said(example.messages)

    def question(self, prompts: Prompts, example: Example) -> list[Message]:
        return prompts.with_system(example.messages[:-1])  # reading leaves the last trained answer at the end

    def answer(self, example: Example) -> str:
        return last_text(example.messages)

    def render(self, renderer: Renderer, example: Example) -> list[Rendered]:
        return renderer.render_conversation(renderer.with_system(example.messages), example.tools)

    def make(self, where: Place, asked: str, answered: str) -> Example:
        messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
        return Example("chat", where, messages=messages)

    def hosted_problems(self, example: Example) -> Iterable[str]:
        return unknown_keys(example.messages)

    def to_openai(self, prompts: Prompts, example: Example) -> JsonObject:
        return openai_messages(prompts.with_system(example.messages), example)


def unknown_keys(messages: Iterable[Message]) -> Iterable[str]:
    """Why hosted models do not take these messages."""
    messages = list(messages)
    for key in NOT_HOSTED:
        if any(key in message for message in messages):
            yield f"messages with {key} are not taken there"
