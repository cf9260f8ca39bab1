"""A prompt and its answer in columns of their own, as texts or lists of messages, with what may stand beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from tunery.data.conversation import LIST, Messages, put_system, read_messages
from tunery.data.example import Tool
from tunery.data.forms.hermes import read_calls
from tunery.data.row_report import (
    LISTS_AS_TEXT,
    Report,
    describe,
    is_written,
    listed,
    read_list,
    read_text,
    read_written,
    report_missing,
    says_nothing,
)
from tunery.data.source import known_here
from tunery.data.tool_calls import CallLedger, read_tools
from tunery.jsonl import JsonMapping, JsonObject, is_list, is_mapping, is_object

_INPUT_KEYS = ("messages", "tools", "parallel_tool_calls")

_TELLING = 20
"""Characters that do not stand in a prompt by chance."""

HISTORY = "turns of a history"


def unweighted(message: JsonMapping) -> JsonObject:
    """A message without its weight."""
    return {key: value for key, value in message.items() if key != "weight"}


def with_context(report: Report, row: JsonMapping, columns: Mapping[str, str], prompt: str) -> str:
    """The prompt, and under it Alpaca's input and the context of a question, where the row has them.

    A row may have an input even if those that detection saw do not.
    """
    is_instruction = columns["prompt"].casefold() == "instruction"
    usual = "input" if is_instruction and "input" not in columns.values() else None
    for key in (columns.get("input", usual), columns.get("context")):
        if key is not None and not says_nothing(row.get(key)):
            text = _context_text(report, row, key)
            if key == columns.get("context") and len(text.strip()) >= _TELLING and text.strip() in prompt:
                report.converted.add("a context that the prompt already holds")
            else:
                prompt = f"{prompt}\n\n{text}"
    return prompt


def _context_text(report: Report, row: JsonMapping, key: str) -> str:
    value = row[key]
    if isinstance(value, str) and value.lstrip().startswith(('["', "['")):  # a list in a CSV
        value = listed(value)
    if is_list(value) and all(isinstance(part, str) for part in value):
        return "\n\n".join(value)
    return read_text(report, row, key, may_be_blank=True)


def read_prompt(
    report: Report, row: JsonMapping, columns: Mapping[str, str], ledger: CallLedger
) -> tuple[Messages | None, tuple[Tool, ...]]:
    """(messages before the answers, or None where the row gives none; tools)."""
    key = columns.get("prompt")
    value = None if key is None else _read_written(report, key, row.get(key))
    tools_key = columns.get("tools", "tools")
    tools = read_tools(report, tools_key, row.get(tools_key))
    if key is None or value is None:
        return None, tools
    if isinstance(value, str) and value.rstrip().endswith("Assistant:"):
        value = read_transcript(report, value)
    if is_object(value) and ("role" in value or "from" in value):
        value = [value]
    if is_mapping(value):
        messages, tools = _openai_input(report, key, value, ledger)
    elif isinstance(value, str):
        if not value.strip():
            report.add(key, "empty", "write the prompt, or remove the row")
        messages = [{"role": "user", "content": with_context(report, row, columns, value)}]
    elif is_list(value):
        if not value:
            report.add(key, "empty", LIST)
        messages = read_messages(report, key, value, ledger)
    else:
        report.add(key, f"a text or a list of messages is needed, not {describe(value)}", LIST)
        return [], tools
    if not isinstance(value, str) and "context" in columns and not says_nothing(row.get(columns["context"])):
        report.add(columns["context"], "only a prompt that is a text can have a context", "put it into the messages")
    if not isinstance(value, str):  # what a list holds of the assistant is read, not trained, unless it says so
        messages = [{"weight": 0, **m} if m.get("role") == "assistant" else m for m in messages]
    return put_system(report, row, columns, [*_history(report, row, columns, ledger), *messages]), tools


def _history(report: Report, row: JsonMapping, columns: Mapping[str, str], ledger: CallLedger) -> Messages:
    """The turns before the prompt: Alpaca's pairs of question and answer, or messages."""
    key = columns.get("history")
    if key is None or says_nothing(row.get(key)):
        return []
    turns = read_list(report, key, row[key], 'write [["question", "answer"], …], or a list of messages') or []
    if all(map(is_object, turns)):
        return read_messages(report, key, turns, ledger)
    messages: Messages = []
    for index, turn in enumerate(turns):
        if is_list(turn) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        else:
            report.add(f"{key}[{index}]", "a turn is a question and its answer, two texts", 'write ["…", "…"]')
    report.converted.add(HISTORY)
    return messages


def _openai_input(
    report: Report, key: str, value: JsonMapping, ledger: CallLedger
) -> tuple[Messages, tuple[Tool, ...]]:
    for unknown in sorted(set(value) - set(_INPUT_KEYS)):
        if not says_nothing(value[unknown]):
            report.add(f"{key}.{unknown}", "unknown key", known_here(unknown, _INPUT_KEYS))
    parallel = value.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        report.add(f"{key}.parallel_tool_calls", f"true or false is needed, not {describe(parallel)}", "write true")
    tools = read_tools(report, f"{key}.tools", value.get("tools"))
    if value.get("messages") is None:
        report_missing(report, value, "messages", f"{key}.")
        return [], tools
    messages = read_list(report, f"{key}.messages", value["messages"], LIST)
    if messages == []:
        report.add(f"{key}.messages", "empty", LIST)
    return read_messages(report, f"{key}.messages", messages or [], ledger), tools


_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
TRANSCRIPTS = "transcripts (Human: …, Assistant: …)"


def read_transcript(report: Report, value: object) -> object:
    """The messages of a text that is a conversation as Anthropic once wrote it (Bai et al. 2022, HH-RLHF): turns that
    begin with Human: and Assistant:, of which the last may be left to write. Any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:") or "\n\nAssistant:" not in value:
        return value
    report.converted.add(TRANSCRIPTS)
    _, *turns = _SPEAKER.split(value.strip())
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    return messages if messages[-1]["content"] else messages[:-1]


def _read_written(report: Report, key: str, value: object) -> object:
    """What a text says that is messages as CSV holds them; any other value as it is."""
    if not isinstance(value, str) or not is_written(value):
        return value
    report.converted.add(LISTS_AS_TEXT)
    return read_written(report, key, value, LIST)


def read_answer(report: Report, key: str, value: object, ledger: CallLedger) -> Messages:
    """The messages of an answer, or of a whole conversation that ends with it."""
    value = _read_written(report, key, value)
    if is_object(value) and ("role" in value or "from" in value):
        value = [value]
    if value is None:  # already reported
        return []
    if isinstance(value, str):
        if not value.strip():
            report.add(key, "the answer is empty", "write the answer, or remove the row")
        return [{"role": "assistant", "content": value}]
    if not is_list(value):
        report.add(key, f"a text or a list of messages is needed, not {describe(value)}", LIST)
        return []
    if not value:
        report.add(key, "empty", 'write [{"role": "assistant", "content": …}]')
    return read_messages(report, key, value, ledger)


def with_calls(report: Report, answer: object, tools: Sequence[Tool]) -> object:
    """An answer that is nothing but calls of offered tools, {name, arguments} in a list or as text (xLAM), as a
    message; any other as it is."""
    text = json.dumps(answer) if is_list(answer) and all(map(_is_call, answer)) else answer
    if not isinstance(text, str) or not text.lstrip().startswith(("[", "{")) or not (calls := read_calls([text])):
        return answer
    offered = {tool["function"].get("name") for tool in tools}
    if any(call["function"]["name"] not in offered for call in calls):  # another JSON that has names
        return answer
    report.converted.add("answers that are calls of tools")
    return [{"role": "assistant", "tool_calls": calls}]


def _is_call(value: object) -> bool:
    return is_object(value) and "name" in value and "role" not in value


def begins_with_answer(report: Report, key: str, messages: Sequence[JsonMapping]) -> bool:
    """Whether an answer begins and ends with a message of the assistant; a problem where it does not."""
    if messages[0]["role"] != "assistant":
        report.add(
            key,
            f"an answer begins with an assistant message, not with role {messages[0]['role']}",
            "put what it follows into the prompt",
        )
    elif messages[-1]["role"] != "assistant":
        report.add(key, "an answer ends with an assistant message", f"remove what follows it ({messages[-1]['role']})")
    else:
        return True
    return False
