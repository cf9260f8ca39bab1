"""A prompt and how it goes on, as text without a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from tunery.data.example import Example, ExampleFields, Message, Place, Rendered
from tunery.data.exchange import with_context
from tunery.data.kinds.base import STAND_IN, Columns, Kind
from tunery.data.kinds.columns import (
    COMPLETION_COLUMNS,
    CONTEXT_COLUMNS,
    MEANINGS,
    PROMPT_COLUMNS,
    VERDICT,
    holds_lists,
)
from tunery.data.prompts import Prompts
from tunery.data.row_report import Report, read_text
from tunery.jsonl import JsonMapping

if TYPE_CHECKING:
    from tunery.data.render import Renderer


class Completion(Kind):
    """See the module."""

    name = "completion"
    required: ClassVar = {"prompt": PROMPT_COLUMNS, "completion": COMPLETION_COLUMNS}
    optional: ClassVar = {"context": CONTEXT_COLUMNS}
    meanings = (*MEANINGS, VERDICT)
    templated = False
    chat_hint = "each line you type is a prompt to complete."
    stand_ins: ClassVar = {"completion": STAND_IN}
    hosted_note = (
        "completions are sent as conversations: the prompt as the user's message, the completion as the answer"
    )

    def plausible(self, rows: Sequence[JsonMapping], columns: Columns) -> bool:
        """A prompt or an answer that is a list of messages belongs to a conversation."""
        return not holds_lists(rows, columns)

    def parse(
        self, report: Report, row: JsonMapping, columns: Columns, labels: Mapping[str, str] | None
    ) -> ExampleFields:
        prompt = read_text(report, row, columns["prompt"], may_be_blank=True)
        return {
            "prompt": with_context(report, row, columns, prompt),
            "completion": read_text(report, row, columns["completion"]),
        }

    def key(self, example: Example) -> tuple[str, str]:
        return example.prompt, example.completion

    def question(self, prompts: Prompts, example: Example) -> list[Message]:
        return prompts.with_system([{"role": "user", "content": example.prompt}])

    def answer(self, example: Example) -> str:
        return example.completion

    def ask(self, prompts: Prompts, text: str) -> list[Message] | None:
        return None

    def prompt_text(self, example: Example) -> str | None:
        return example.prompt

    def render(self, renderer: Renderer, example: Example) -> list[Rendered]:
        start, whole = len(example.prompt), example.prompt + example.completion
        return [Rendered(whole, ((start, len(whole)),), begin=True, end=True)]

    def make(self, where: Place, asked: str, answered: str) -> Example:
        return Example("completion", where, prompt=asked, completion=f" {answered}")

    def hosted_problems(self, example: Example) -> Iterable[str]:
        if not example.prompt.strip():
            yield "the prompt is empty, and a conversation begins with what the user says"
