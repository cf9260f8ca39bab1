"""One answer to a prompt, and whether it was good: thumbs up or down.

Read as prompt, completion and label, or as a conversation (messages) and label. The label is true or false, 1 or 0, or
one of the usual words and signs (GOOD, BAD).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from tunery.data.conversation import LIST, put_system, read_messages
from tunery.data.example import Example, ExampleFields, Message, Place, Rendered
from tunery.data.exchange import read_answer, read_prompt, unweighted
from tunery.data.kinds.base import STAND_IN, Columns, Kind, all_said, last_text, said_by_user, with_stand_in, without
from tunery.data.kinds.columns import (
    BESIDE_A_PROMPT,
    COMPLETION_COLUMNS,
    FEEDBACK_COLUMNS,
    MESSAGE_COLUMNS,
    PROMPT_COLUMNS,
    TOOL_COLUMNS,
)
from tunery.data.kinds.preference import check_answer
from tunery.data.kinds.values import label_text, same_label
from tunery.data.prompts import Prompts
from tunery.data.row_report import Report, read_list, report_missing
from tunery.data.source import printable
from tunery.data.tool_calls import CallLedger, read_tools
from tunery.jsonl import JsonMapping, JsonObject

if TYPE_CHECKING:
    from tunery.data.render import Renderer

GOOD = ("true", "1", "yes", "good", "up", "thumbs_up", "thumbs up", "👍", "like", "liked", "desirable", "positive")
BAD = (
    *("false", "0", "-1", "no", "bad", "down", "thumbs_down", "thumbs down", "👎", "dislike", "disliked"),
    *("undesirable", "negative"),
)
"""What labels may say, in any case."""

SURE = 0.9
"""Fraction of the labels that must say good or bad for a file to be taken as feedback."""

_VERDICTS: dict[str, bool] = {**dict.fromkeys(GOOD, True), **dict.fromkeys(BAD, False)}


def verdict(value: object) -> bool | None:
    """Whether a label says that an answer is good; None for any other label."""
    text = label_text(value)
    return None if text is None else _VERDICTS.get(same_label(text).casefold())


class Feedback(Kind):
    """See the module."""

    name = "feedback"
    required: ClassVar = {"label": FEEDBACK_COLUMNS}
    optional: ClassVar = {
        "prompt": PROMPT_COLUMNS,
        "completion": COMPLETION_COLUMNS,
        "messages": MESSAGE_COLUMNS,
        "tools": TOOL_COLUMNS,
        **BESIDE_A_PROMPT,
    }
    settings = ("system",)
    converses = True
    stand_ins: ClassVar = {"label": True, "completion": STAND_IN}

    def choose(self, found: Columns) -> Columns:
        return found if "messages" not in found else without(found, "prompt", "completion", "history", "context")

    def missing(self, found: Collection[str]) -> list[str]:
        answer = () if "messages" in found else ("prompt", "completion")
        return [role for role in ("label", *answer) if role not in found]

    def plausible(self, rows: Sequence[JsonMapping], columns: Columns) -> bool:
        """Nearly all labels that are there say good or bad; the others are then reported, row by row."""
        labels = [text for row in rows if (text := label_text(row.get(columns["label"])))]
        return sum(verdict(label) is not None for label in labels) >= max(1, SURE * len(labels))

    def parse(
        self, report: Report, row: JsonMapping, columns: Columns, labels: Mapping[str, str] | None
    ) -> ExampleFields:
        good = _read_verdict(report, row, columns["label"])
        if "messages" in columns:
            fields, answer = _conversation(report, row, columns)
        else:
            fields, answer = _prompt_and_answer(report, row, columns)
        fields["chosen" if good else "rejected"] = tuple(map(unweighted, answer))
        return fields

    def parse_question(self, report: Report, row: JsonMapping, columns: Columns) -> ExampleFields:
        row = with_stand_in(row, columns["messages"]) if "messages" in columns else row
        return super().parse_question(report, row, columns)

    def notes(self, train: Sequence[Example]) -> list[str]:
        good = sum(bool(row.chosen) for row in train)
        return [f"Answers marked good: {good:,}; marked bad: {len(train) - good:,}."]

    def remarks(self, train: Sequence[Example]) -> list[str]:
        said = [json.dumps((row.messages, row.tools, row.chosen or row.rejected), sort_keys=True) for row in train]
        seen = set(zip(said, (bool(row.chosen) for row in train), strict=True))
        both = sum((text, True) in seen and (text, False) in seen for text in dict.fromkeys(said))
        return [f"answers that are marked good in one row and bad in another: {both:,}"] if both else []

    def key(self, example: Example) -> tuple[str, str]:
        return said_by_user(example.messages), all_said((*example.messages, *example.chosen, *example.rejected))

    def question(self, prompts: Prompts, example: Example) -> list[Message]:
        return prompts.with_system(example.messages)

    def answer(self, example: Example) -> str:
        return last_text(example.chosen)

    def render(self, renderer: Renderer, example: Example) -> list[Rendered]:
        answer, good = example.chosen or example.rejected, bool(example.chosen)
        return [renderer.render_answer(renderer.with_system(example.messages), answer, example.tools, good)]

    def make(self, where: Place, asked: str, answered: str) -> Example:
        question, answer = {"role": "user", "content": asked}, {"role": "assistant", "content": answered}
        return Example("feedback", where, messages=(question,), chosen=(answer,))

    def hosted_refusal(self) -> tuple[str, str] | None:
        return (
            "hosted models do not learn from answers marked good or bad (kind feedback)",
            "give pairs of answers (data.kind: preference), or train a model here: --set model=smollm2-135m-instruct",
        )


def _read_verdict(report: Report, row: JsonMapping, key: str) -> bool:
    if row.get(key) is None:
        report_missing(report, row, key)
        return False
    good = verdict(row[key])
    if good is None:
        said = printable(str(row[key]))
        report.add(key, f"{said!r} does not say whether the answer is good", "write true or false (or 1 or 0)")
    return bool(good)


def _prompt_and_answer(report: Report, row: JsonMapping, columns: Columns) -> tuple[ExampleFields, list[JsonObject]]:
    columns = {"prompt": "prompt", "completion": "completion", **columns}
    key, answered, ledger = columns["prompt"], columns["completion"], CallLedger()
    missing = [name for name in (key, answered) if row.get(name) is None]
    for name in missing:
        report_missing(report, row, name)
    if missing:
        return {}, []
    prompt, tools = read_prompt(report, row, columns, ledger)
    answer = read_answer(report, answered, row[answered], ledger)
    if not report.problems:
        check_answer(report, answered, answer)
    return {"messages": tuple(map(unweighted, prompt or ())), "tools": tools}, answer


def _conversation(report: Report, row: JsonMapping, columns: Columns) -> tuple[ExampleFields, list[JsonObject]]:
    """The conversation up to the last words of the user, and what follows: the answer that the label is about."""
    key = columns["messages"]
    if row.get(key) is None:
        report_missing(report, row, key)
        return {}, []
    tools_key = columns.get("tools", "tools")
    tools = read_tools(report, tools_key, row.get(tools_key))
    value = read_list(report, key, row[key], LIST)
    messages = put_system(report, row, columns, read_messages(report, key, value or [], CallLedger()))
    if report.problems:
        return {}, []
    said = [index for index, message in enumerate(messages) if message["role"] == "user"]
    start = said[-1] + 1 if said else 0
    if start == len(messages):
        report.add(key, "no answer follows what the user says", "end with the assistant's answer, or remove the row")
        return {}, []
    check_answer(report, key, messages[start:])
    return {"messages": tuple(map(unweighted, messages[:start])), "tools": tools}, messages[start:]
