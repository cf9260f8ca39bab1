"""A text and its label: the model is told the instruction and the text, and answers with the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from tunery.data.example import Example, ExampleFields, Message, Place, Rendered
from tunery.data.kinds.base import STAND_IN, Columns, Encoded, Kind
from tunery.data.kinds.columns import MEANINGS, REST_OF_A_TEXT, TEXT_COLUMNS
from tunery.data.kinds.values import read_label
from tunery.data.prompts import Prompts
from tunery.data.row_report import Report, read_text
from tunery.jsonl import JsonMapping

if TYPE_CHECKING:
    from tunery.data.render import Renderer


class Classification(Kind):
    """See the module."""

    name = "classification"
    required: ClassVar = {"text": TEXT_COLUMNS, "label": ("label", "sentiment", "category", "class", "target")}
    meanings = (*MEANINGS, REST_OF_A_TEXT)
    settings = ("labels", "instruction", "system")
    chat_hint = "each line you type is classified."
    stand_ins: ClassVar = {"label": STAND_IN}

    def parse(
        self, report: Report, row: JsonMapping, columns: Columns, labels: Mapping[str, str] | None
    ) -> ExampleFields:
        text = read_text(report, row, columns["text"])
        return {"text": text, "label": read_label(report, row, columns["label"], labels)}

    def remarks(self, train: Sequence[Example]) -> list[str]:
        labels: dict[str, str] = {}
        twice: dict[str, Example] = {}
        for row in train:
            if labels.setdefault(row.text, row.label) != row.label:
                twice.setdefault(row.text, row)
        if not twice:
            return []
        where = next(iter(twice.values())).where
        return [
            f"training texts that have one label in one row and another in another: {len(twice):,} (such as {where})"
        ]

    def key(self, example: Example) -> tuple[str, str]:
        return example.text, ""

    def question(self, prompts: Prompts, example: Example) -> list[Message]:
        return prompts.label_question(example.text)

    def answer(self, example: Example) -> str:
        return example.label

    def ask(self, prompts: Prompts, text: str) -> list[Message] | None:
        return prompts.label_question(text)

    def render(self, renderer: Renderer, example: Example) -> list[Rendered]:
        question = renderer.label_question(example.text)
        return renderer.render_conversation([*question, {"role": "assistant", "content": example.label}])

    def cut(self, renderer: Renderer, example: Example, row: Encoded, limit: int) -> list[Encoded]:
        """The end of the text goes; the instruction and the label stay."""
        text = fitting_text(renderer, example, limit)
        if not text:
            return []
        return [Encoded(*encoded) for encoded in renderer.encode(renderer.render(replace(example, text=text)))]

    def make(self, where: Place, asked: str, answered: str) -> Example:
        return Example("classification", where, text=asked, label=answered)

    def shown(self, example: Example) -> str | None:
        return example.text


def fitting_text(renderer: Renderer, example: Example, limit: int) -> str:
    """The text of an example, its end cut until the row has at most `limit` tokens; "" if none fits."""
    text = example.text
    while text:
        over = len(renderer.encode(renderer.render(replace(example, text=text)))[0][0]) - limit
        if over <= 0:
            return text
        starts = renderer.token_starts(text)
        text = text[: starts[-over]].rstrip() if over < len(starts) else ""
    return ""
