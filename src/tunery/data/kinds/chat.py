"""Conversations: `messages` in OpenAI's form, and `tools` where there are some.

Also a prompt and its answer in columns of their own, where either is a list of messages, or where a system message or
earlier turns stand beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from tunery.data.conversation import read_conversation
from tunery.data.example import Example, ExampleFields, Message, Place, Rendered
from tunery.data.exchange import begins_with_answer, read_answer, read_prompt, with_calls
from tunery.data.kinds.base import (
    STAND_IN,
    Columns,
    Kind,
    all_said,
    last_text,
    openai_messages,
    said_by_user,
    with_stand_in,
    without,
)
from tunery.data.kinds.columns import (
    BESIDE_A_PROMPT,
    COMPLETION_COLUMNS,
    MEANINGS,
    MESSAGE_COLUMNS,
    PROMPT_COLUMNS,
    TOOL_COLUMNS,
    VERDICT,
    holds_lists,
)
from tunery.data.prompts import Prompts
from tunery.data.row_report import Report, report_missing
from tunery.data.tool_calls import CallLedger
from tunery.jsonl import JsonMapping, JsonObject

if TYPE_CHECKING:
    from tunery.data.render import Renderer

NOT_HOSTED = ("reasoning_content",)
"""Keys of a message that hosted models do not take."""


class Chat(Kind):
    """See the module."""

    name = "chat"
    required: ClassVar = {}
    optional: ClassVar = {
        "messages": MESSAGE_COLUMNS,
        "prompt": PROMPT_COLUMNS,
        "completion": COMPLETION_COLUMNS,
        "tools": TOOL_COLUMNS,
        **BESIDE_A_PROMPT,
    }
    meanings = (*MEANINGS, VERDICT)
    settings = ("system",)
    converses = True

    def missing(self, found: Collection[str]) -> list[str]:
        if "messages" in found:
            return []
        absent = [role for role in ("prompt", "completion") if role not in found]
        return ["messages", *absent] if absent else []

    def choose(self, found: Columns) -> Columns:
        return found if "messages" not in found else without(found, "prompt", "history", "context")

    def plausible(self, rows: Sequence[JsonMapping], columns: Columns) -> bool:
        """A prompt and an answer that are plain texts, with nothing said before them, are a completion."""
        telling = ("messages", "system", "history", "tools")
        return any(role in columns for role in telling) or holds_lists(rows, columns)

    def parse(
        self, report: Report, row: JsonMapping, columns: Columns, labels: Mapping[str, str] | None
    ) -> ExampleFields:
        return read_conversation(report, row, columns) if "messages" in columns else read_exchange(report, row, columns)

    def parse_question(self, report: Report, row: JsonMapping, columns: Columns) -> ExampleFields:
        if "messages" not in columns:
            return self.parse(report, {**row, columns.get("completion", "completion"): STAND_IN}, columns, None)
        key, beside = columns["messages"], columns.get("completion")
        row = with_stand_in({name: value for name, value in row.items() if name != beside}, key)
        fields = self.parse(report, row, columns, None)
        *asked, stand_in = fields.get("messages") or ({},)
        if asked and asked[-1].get("role") == "assistant":  # the row's own answer
            asked.pop()
        if not asked and not report.problems:
            report.add(key, "there is nothing to answer", "put what the user says before the answer")
        return {**fields, "messages": (*asked, stand_in)}

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


def read_exchange(report: Report, row: JsonMapping, columns: Columns) -> ExampleFields:
    """The conversation of a prompt and its answer; {} where there is a problem. What the prompt holds of the assistant
    is read, not trained, unless its weight is 1; the turns of a history are trained as those of every conversation."""
    for role in ("prompt", "completion"):
        if row.get(columns[role]) is None:
            report_missing(report, row, columns[role])
    key, ledger = columns["completion"], CallLedger()
    prompt, tools = read_prompt(report, row, columns, ledger)
    answered = with_calls(report, row.get(key), tools)
    answer = read_answer(report, key, answered, ledger)
    if report.problems or prompt is None or not begins_with_answer(report, key, answer):
        return {}
    if all(message.get("weight") == 0 for message in answer if message["role"] == "assistant"):
        report.add(key, "nothing to train on: every message of the answer has weight 0", "give one weight 1")
        return {}
    return {"messages": (*prompt, *answer), "tools": tools}


def unknown_keys(messages: Iterable[Message]) -> Iterable[str]:
    """Why hosted models do not take these messages."""
    messages = list(messages)
    for key in NOT_HOSTED:
        if any(key in message for message in messages):
            yield f"messages with {key} are not taken there"
