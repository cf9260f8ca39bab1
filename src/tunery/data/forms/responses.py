"""Items of OpenAI's Responses API: message, reasoning, function_call and function_call_output."""

from __future__ import annotations

from typing import ClassVar

from tunery.data.forms.base import MessageForm, parts_of, tool_answer, tool_call
from tunery.jsonl import JsonMapping, JsonObject

_ITEMS = ("message", "reasoning", "function_call", "function_call_output")
_OTHER_ITEMS = ("_call", "_call_output", "_list_tools", "_approval_request", "_reference")
"""Ends of the types of items that are not read, such as web_search_call."""
_OF_ITEMS = ("type", "id", "status", "phase")
"""What a message says of itself as an item."""


class Responses(MessageForm):
    """See the module."""

    name: ClassVar = "items of the Responses API"
    merges: ClassVar = True

    def fits(self, message: JsonMapping) -> bool:
        kind = message.get("type")
        return kind in _ITEMS or (isinstance(kind, str) and "role" not in message and kind.endswith(_OTHER_ITEMS))

    def convert(self, message: JsonMapping) -> list[JsonObject]:
        call = str(message.get("call_id") or message.get("id") or "")
        match message["type"]:
            case "function_call":
                return [
                    {
                        "role": "assistant",
                        "tool_calls": [tool_call(message.get("name"), message.get("arguments"), call)],
                    }
                ]
            case "function_call_output":
                return [tool_answer(message.get("output", ""), call)]
            case "reasoning":
                thoughts = parts_of(message, "content") or parts_of(message, "summary")
                text = "\n".join(str(part.get("text") or "") for part in thoughts)
                return [{"role": "assistant", "reasoning_content": text}] if text.strip() else []
            case str() as kind if kind not in _ITEMS:  # for the check to name
                return [{"role": "assistant", "content": [{"type": kind}]}]
            case _:
                return [{key: value for key, value in message.items() if key not in _OF_ITEMS}]
