"""OpenAI's older functions: function_call in a message, the role function, and `functions` beside the messages."""

from __future__ import annotations

from typing import ClassVar

from tunery.data.forms.base import MessageForm, function_tool
from tunery.jsonl import JsonMapping, JsonObject, is_object


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
        if not any(key in entry for key in ("parameters", "description", "type")) and len(entry) > 1:
            return None
        tool = function_tool(entry["name"], entry.get("description"), entry.get("parameters"))
        if entry.get("strict") is not None:
            tool["function"]["strict"] = entry["strict"]
        return [tool]
