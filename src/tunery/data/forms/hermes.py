"""Hermes' tool turns (Nous Research): calls and answers as JSON in the text, in <tool_call> and <tool_response>."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tunery.data.forms.base import MessageForm, tool_answer, tool_call
from tunery.data.row_report import python_value
from tunery.data.strict_json import decode_text
from tunery.jsonl import JsonMapping, JsonObject, is_list, is_object

_OF_A_CALL = {"name", "arguments", "parameters", "id", "type"}
_CALL, _ANSWER = "tool_call", "tool_response"


class Hermes(MessageForm):
    """See the module."""

    name: ClassVar = "tool calls in Hermes' blocks"
    calls_in_text: ClassVar = True

    def fits(self, message: JsonMapping) -> bool:
        content = message.get("content")
        if not isinstance(content, str) or "tool_calls" in message:
            return False
        if message.get("role") == "assistant":
            return _ends_with_calls(content) and bool(read_calls(_blocks(content, _CALL)[0]))
        return message.get("role") == "tool" and bool(_blocks(content, _ANSWER)[0])

    def convert(self, message: JsonMapping) -> list[JsonObject]:
        return from_blocks(message)


def from_blocks(message: JsonMapping) -> list[JsonObject]:
    """A message with role and content, and the calls or answers in the blocks of its text as such."""
    content = message["content"]
    if message["role"] == "tool":
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        return [{**_answer(block), **rest} for block in _blocks(content, _ANSWER)[0] or [content]]
    if message["role"] != "assistant" or not _ends_with_calls(content):
        return [dict(message)]
    blocks, said = _blocks(content, _CALL)
    calls: object = read_calls(blocks) or next((block for block in blocks if block.startswith("{")), None)
    if not calls:  # written in another way
        return [dict(message)]
    return [{**message, "content": said.strip(), "tool_calls": calls}]


def _blocks(text: str, tag: str) -> tuple[list[str], str]:
    """(what stands in blocks of a tag, what stands around them)."""
    inside, around, place = list[str](), list[str](), 0
    while (start := text.find(f"<{tag}>", place)) >= 0 and (end := text.find(f"</{tag}>", start)) >= 0:
        around.append(text[place:start])
        inside.append(text[start + len(tag) + 2 : end].strip())
        place = end + len(tag) + 3
    return inside, "".join([*around, text[place:]])


def _ends_with_calls(content: str) -> bool:
    """Whether a message calls: one that only speaks of calls says something after the last of them."""
    return content.rstrip().endswith("</tool_call>")


def read_calls(texts: Sequence[str]) -> list[JsonObject]:
    """The calls in texts of JSON, each an object with name and arguments or a list of such; none if one is not."""
    found: list[JsonObject] = []
    for text in texts:
        value = _value(text)
        for call in value if is_list(value) else [value]:
            if not is_object(call) or "name" not in call or not call.keys() <= _OF_A_CALL:
                return []
            found.append(
                tool_call(call["name"], call.get("arguments", call.get("parameters")), str(call.get("id", "")))
            )
    return found


def _answer(text: str) -> JsonObject:
    """A tool's answer, which Hermes wraps together with the tool's name."""
    value = _value(text)
    if is_object(value) and "content" in value and set(value) <= {"name", "content", "tool_call_id"}:
        return tool_answer(value["content"], name=str(value.get("name") or ""))
    return tool_answer(text)


def _value(text: str) -> object:
    try:
        value, faults = decode_text(text)
    except ValueError:
        return python_value(text)  # some of Hermes' own calls are written so
    return None if faults else value
