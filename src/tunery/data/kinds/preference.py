"""Two answers to one prompt, of which the first is preferred.

Read in OpenAI's form ({input: {messages, tools}, preferred_output, non_preferred_output}) and in the field's usual one
(prompt, chosen, rejected: texts, or lists of messages; without a prompt, two conversations that begin alike).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from tunery.data.conversation import Messages, put_system
from tunery.data.example import Example, ExampleFields, Message, Place, Rendered
from tunery.data.exchange import begins_with_answer, read_answer, read_prompt, read_transcript, unweighted
from tunery.data.kinds.base import (
    STAND_IN,
    Columns,
    Encoded,
    Fitted,
    Kind,
    all_said,
    last_text,
    openai_messages,
    plain_calls,
    said_by_user,
)
from tunery.data.kinds.chat import unknown_keys
from tunery.data.kinds.columns import BESIDE_A_PROMPT, MESSAGE_COLUMNS, PROMPT_COLUMNS, TOOL_COLUMNS
from tunery.data.prompts import Prompts
from tunery.data.row_report import Report, report_missing
from tunery.data.tool_calls import CallLedger
from tunery.jsonl import JsonMapping, JsonObject

if TYPE_CHECKING:
    from tunery.data.render import Renderer


class Preference(Kind):
    """See the module."""

    name = "preference"
    required: ClassVar = {
        "chosen": ("chosen", "preferred", "preferred_output", "preferred_completion"),
        "rejected": ("rejected", "non_preferred", "non_preferred_output", "non_preferred_completion"),
    }
    optional: ClassVar = {"prompt": (*PROMPT_COLUMNS, *MESSAGE_COLUMNS), "tools": TOOL_COLUMNS, **BESIDE_A_PROMPT}
    settings = ("system",)
    pairs = True
    noun = "pair"
    converses = True
    sent_as = "preference"
    stand_ins: ClassVar = {"chosen": STAND_IN, "rejected": f"{STAND_IN}{STAND_IN}"}

    def parse(
        self, report: Report, row: JsonMapping, columns: Columns, labels: Mapping[str, str] | None
    ) -> ExampleFields:
        return read_pair(report, row, columns)

    def parse_question(self, report: Report, row: JsonMapping, columns: Columns) -> ExampleFields:
        """Without a prompt of its own, a row's question is what its two answers have in common."""
        if row.get(columns.get("prompt", "prompt")) is None:
            return self.parse(report, row, columns, None)
        return super().parse_question(report, row, columns)

    def remarks(self, train: Sequence[Example]) -> list[str]:
        against = contradictions(train)
        if not against:
            return []
        return [f"training pairs that another one contradicts, the answers the other way round: {against:,}"]

    def key(self, example: Example) -> tuple[str, str]:
        return said_by_user(example.messages), all_said((*example.messages, *example.chosen))

    def question(self, prompts: Prompts, example: Example) -> list[Message]:
        return prompts.with_system(example.messages)

    def answer(self, example: Example) -> str:
        return last_text(example.chosen)

    def render(self, renderer: Renderer, example: Example) -> list[Rendered]:
        messages = renderer.with_system(example.messages)
        return [
            renderer.render_answer(messages, answer, example.tools, desirable)
            for answer, desirable in ((example.chosen, True), (example.rejected, False))
        ]

    def fit(
        self, renderer: Renderer, example: Example, rows: Sequence[Encoded], limit: int, too_long: str
    ) -> Iterable[Fitted]:
        """What is cut off the front of the prompt is cut off in both rows alike."""
        if reason := _unusable(rows, limit, too_long):
            yield Fitted(reason=reason)
            return
        over = max(len(row.ids) for row in rows) - limit
        if over <= 0:
            yield Fitted(rows)
            return
        begin = 1 if rows[0].ids[0] == renderer.tokenizer.bos_token_id else 0
        yield Fitted([_without(row, begin, begin + over) for row in rows], truncated=True)

    def make(self, where: Place, asked: str, answered: str) -> Example:
        return Example(
            "preference",
            where,
            messages=({"role": "user", "content": asked},),
            chosen=({"role": "assistant", "content": answered},),
            rejected=({"role": "assistant", "content": "I cannot say."},),
        )

    def hosted_problems(self, example: Example) -> Iterable[str]:
        yield from unknown_keys((*example.messages, *example.chosen, *example.rejected))
        for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
            if len(answer) > 1:
                yield f"the {name} answer has {len(answer)} messages, and one is taken there"

    def to_openai(self, prompts: Prompts, example: Example) -> JsonObject:
        return {
            "input": openai_messages(self.question(prompts, example), example),
            "preferred_output": plain_calls(example.chosen),
            "non_preferred_output": plain_calls(example.rejected),
        }


def contradictions(rows: Iterable[Example]) -> int:
    """How many pairs stand there a second time, with the answers the other way round."""
    rows = list(rows)
    prompts = [json.dumps((row.messages, row.tools), sort_keys=True) for row in rows]
    answers = [[json.dumps(answer, sort_keys=True) for answer in (row.chosen, row.rejected)] for row in rows]
    seen = {(prompt, *pair) for prompt, pair in zip(prompts, answers, strict=True)}
    return sum((prompt, *pair[::-1]) in seen for prompt, pair in zip(prompts, answers, strict=True))


# --------------------------------------------------------------------------- length


def _unusable(pair: Sequence[Encoded], limit: int, too_long: str) -> str:
    """Why a pair is left out; "" if it is not."""
    chosen, rejected = pair
    over = max(len(row.ids) for row in pair) - limit
    if chosen.ids == rejected.ids:
        return "both answers are the same tokens"
    if not any(chosen.trained[1:]) or not any(rejected.trained[1:]):
        return "it has no trained token"
    if over > 0 and too_long == "drop":
        return f"longer than {limit} tokens ({limit + over})"
    prompt = min(row.trained.index(True, 1) for row in pair)
    # the first token may be the tokenizer's own, and a token of the prompt must be left
    return f"its answers alone are longer than {limit} tokens" if over > 0 and over + 1 >= prompt else ""


def _without(row: Encoded, start: int, stop: int) -> Encoded:
    """A row without its tokens [start, stop)."""
    return replace(row, ids=row.ids[:start] + row.ids[stop:], trained=row.trained[:start] + row.trained[stop:])


# --------------------------------------------------------------------------- reading


def read_pair(report: Report, row: JsonMapping, columns: Mapping[str, str]) -> ExampleFields:
    """The fields of a preference example; {} where there is a problem.

    Args:
        row: its values. A text stands for one message: of the user as a prompt, of the assistant as an answer.
        columns: role (chosen, rejected, and where there are such columns prompt and tools) → key.
    """
    keys = {role: columns[role] for role in ("chosen", "rejected")}
    for key in keys.values():
        if row.get(key) is None:
            report_missing(report, row, key)
    ledger = CallLedger()
    prompt, tools = read_prompt(report, row, columns, ledger)
    wholes = {key: row.get(key) if prompt else read_transcript(report, row.get(key)) for key in keys.values()}
    answers = {role: read_answer(report, key, wholes[key], ledger.copy()) for role, key in keys.items()}
    if report.problems:
        return {}
    if prompt is None or any(_is_whole(messages) for messages in answers.values()):
        prompt, answers = _shared_beginning(report, columns, prompt, answers)
        prompt = put_system(report, row, columns, prompt)
    for role, key in keys.items():
        check_answer(report, key, answers[role])
    if any("weight" in message and message["weight"] for message in prompt):
        report.add(columns.get("prompt", keys["chosen"]), "what both answers follow is not trained", "remove weight: 1")
    chosen, rejected = (tuple(map(unweighted, answers[role])) for role in keys)
    if chosen == rejected and not report.problems:
        report.add(keys["rejected"], "both answers are the same", "make them differ, or remove the row")
    return {"messages": tuple(map(unweighted, prompt)), "chosen": chosen, "rejected": rejected, "tools": tools}


def _is_whole(messages: Messages) -> bool:
    return messages[0]["role"] != "assistant"


def _shared_beginning(
    report: Report, columns: Mapping[str, str], given: Messages | None, answers: dict[str, Messages]
) -> tuple[Messages, dict[str, Messages]]:
    """(what two whole conversations begin with, what each goes on with). `given`: the row's own prompt, if any."""
    chosen, rejected = answers["chosen"], answers["rejected"]
    same = [unweighted(a) == unweighted(b) for a, b in zip(chosen, rejected, strict=False)]
    shared = same.index(False) if False in same else len(same)
    if shared == len(chosen) == len(rejected):  # said in read_pair
        shared -= 1
    if shared == 0:
        key = columns["chosen"]
        report.add(
            key,
            "there is no prompt, and chosen and rejected begin differently",
            "give a prompt, or two conversations that are the same up to their answers",
        )
        return [], answers
    prompt = chosen[:shared]
    wholes = [[unweighted(message) for message in answer] for answer in (chosen, rejected)]
    if given is not None and not _begins_with(prompt, given) and list(map(unweighted, given)) not in wholes:
        report.add(
            columns["prompt"],
            "the conversations in chosen and rejected do not begin with this prompt",
            "make them begin with it, or remove the prompt",
        )
    return prompt, {"chosen": chosen[shared:], "rejected": rejected[shared:]}


def _begins_with(conversation: Messages, given: Messages) -> bool:
    """Whether a conversation holds the messages given, one after another, after an optional system message."""
    plain, wanted = [[unweighted(m) for m in part] for part in (conversation, given)]
    return any(plain[at : at + len(wanted)] == wanted for at in range(len(plain)))


def check_answer(report: Report, key: str, messages: Messages) -> None:
    if not messages:
        report.add(key, "the other conversation continues where this one ends", "give both an answer of their own")
        return
    begins_with_answer(report, key, messages)
    if any(message.get("weight") == 0 for message in messages):
        report.add(key, "every assistant message of an answer is compared", "remove weight: 0")
