"""ShareGPT's messages ({from, value}), with tool turns as LLaMA-Factory (function_call, observation) and Hermes
(<tool_call>, <tool_response>) write them."""

from __future__ import annotations

import re
from typing import ClassVar

from tunery.data.forms.base import MessageForm, tool_answer, tool_call
from tunery.data.strict_json import decode_text
from tunery.jsonl import JsonMapping, JsonObject, is_list, is_object

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "ai"), "assistant"),
}
_CALLS = ("function_call", "tool_call")
_ANSWERS = ("observation", "function_response", "tool_response", "tool")
_OURS = ("system", "developer", "user", "assistant", "tool", "function")
_CALL_BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_ANSWER_BLOCK = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


class ShareGPT(MessageForm):
    """See the module."""

    name: ClassVar = "ShareGPT messages"
    keys: ClassVar = {"role": "from", "content": "value"}
    merges: ClassVar = True

    def fits(self, message: JsonMapping) -> bool:
        if "role" not in message:
            return "from" in message
        return message["role"] in (*_ROLES, *_CALLS, *_ANSWERS) and message["role"] not in _OURS

    def convert(self, message: JsonMapping) -> list[JsonObject]:
        message = {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}
        role, content = message["role"], message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return [message]
        if role in _CALLS:
            calls = _calls([content])
            rest = {key: value for key, value in message.items() if key != "content"}
            return [{**rest, "role": "assistant", "tool_calls": calls}] if calls else [message]
        if role in _ANSWERS:
            return [_answer(block) for block in _ANSWER_BLOCK.findall(content) or [content]]
        if _ROLES.get(role) == "assistant" and (calls := _calls(_CALL_BLOCK.findall(content))):
            said = _CALL_BLOCK.sub("", content).strip()
            return [{**message, "role": "assistant", "content": said, "tool_calls": calls}]
        return [{**message, "role": _ROLES.get(role, role)}]


def _calls(texts: list[str]) -> list[JsonObject]:
    """The calls in texts of JSON, each an object with name and arguments or a list of such; none if one is not."""
    found: list[JsonObject] = []
    for text in texts:
        value = _value(text)
        for call in value if is_list(value) else [value]:
            if not is_object(call) or "name" not in call:
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
        return None
    return None if faults else value
