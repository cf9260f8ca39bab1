"""Running text, which the model learns to go on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tunery.data.example import Example, ExampleFields, Message, Place, Rendered
from tunery.data.kinds.base import Columns, Encoded, Kind
from tunery.data.kinds.columns import CLASS, MEANINGS, TEXT_COLUMNS, VERDICT
from tunery.data.prompts import Prompts
from tunery.data.row_report import Report, read_text
from tunery.jsonl import JsonMapping

if TYPE_CHECKING:
    from tunery.data.render import Renderer

SMALLEST_WINDOW = 16
"""A long text's last window is joined to nothing if shorter than this; it is then left out and counted as cut."""

CONTINUE_AFTER = 32
"""Tokens given before the model writes on, when it is judged."""


class PlainText(Kind):
    """See the module."""

    name = "text"
    required: ClassVar = {"text": TEXT_COLUMNS}
    plain_text = True
    last_resort = True
    meanings = (*MEANINGS, VERDICT, CLASS)
    templated = False
    chat_hint = "the model writes on from each line you type."

    def parse(
        self, report: Report, row: JsonMapping, columns: Columns, labels: Mapping[str, str] | None
    ) -> ExampleFields:
        return {"text": read_text(report, row, columns.get("text", "text"))}

    def key(self, example: Example) -> tuple[str, str]:
        return example.text, ""

    def question(self, prompts: Prompts, example: Example) -> list[Message]:
        return prompts.with_system([{"role": "user", "content": example.text}])

    def answer(self, example: Example) -> str:
        return ""

    def ask(self, prompts: Prompts, text: str) -> list[Message] | None:
        return None

    def prompt_text(self, example: Example) -> str | None:
        return example.text

    def render(self, renderer: Renderer, example: Example) -> list[Rendered]:
        return [Rendered(example.text, ((0, len(example.text)),), begin=True, end=True)]

    def cut(self, renderer: Renderer, example: Example, row: Encoded, limit: int) -> list[Encoded]:
        """Windows, one after another."""
        windows = [row.part(at, at + limit) for at in range(0, len(row.ids), limit)]
        return [window for window in windows if len(window.ids) >= min(SMALLEST_WINDOW, limit)]

    def answer_start(self, weights: np.ndarray) -> int:
        return min(CONTINUE_AFTER, len(weights) // 2)

    def make(self, where: Place, asked: str, answered: str) -> Example:
        return Example("text", where, text=f"{asked} {answered}")

    def hosted_refusal(self) -> tuple[str, str] | None:
        return (
            "a hosted model learns answers, and these rows are plain text (kind text)",
            "give prompts and completions (data.kind: completion), or train a model here: "
            "--set model=smollm2-135m-instruct",
        )
