"""OpenAI's older functions: function_call in a message, the role function, and `functions` beside the messages."""

from __future__ import annotations

from typing import ClassVar

from tunery.data.forms.base import MessageForm, function_tool
from tunery.jsonl import JsonMapping, JsonObject, is_object

_SCHEMA_KEYS = ("parameters", "inputSchema")
"""Of what a tool takes (the second is that of the Model Context Protocol)."""


class OldFunctions(MessageForm):
    """See the module. Tools without the word function around them are written so elsewhere, too."""

    name: ClassVar = "messages with function_call"
    tools_name: ClassVar = "tools without the word function"

    def fits(self, message: JsonMapping) -> bool:
        return is_object(message.get("function_call")) or message.get("role") == "function"

    def convert(self, message: JsonMapping) -> list[JsonObject]:
        if message.get("role") == "function":
            return [{**message, "role": "tool"}]
        rest = {key: value for key, value in message.items() if key != "function_call"}
        call = {"type": "function", "function": message["function_call"]}
        return [{**rest, "tool_calls": [*rest.get("tool_calls", ()), call]}]

    def tools(self, entry: JsonMapping) -> list[JsonObject] | None:
        if "function" in entry or "name" not in entry or entry.get("type", "function") != "function":
            return None
        schema = next((key for key in _SCHEMA_KEYS if key in entry), None)
        if schema is None and not any(key in entry for key in ("description", "type")) and len(entry) > 1:
            return None
        rest = {key: part for key, part in entry.items() if key not in ("type", "name", "description", schema)}
        tool = function_tool(entry["name"], entry.get("description"), entry[schema] if schema else None)
        return [{**tool, "function": {**tool["function"], **rest}}]
