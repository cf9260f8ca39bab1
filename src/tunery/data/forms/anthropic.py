"""Claude's Messages API: content in blocks of text, thinking, tool_use and tool_result; tools with an input_schema."""

from __future__ import annotations

from typing import ClassVar

from tunery.data.forms.base import (
    MessageForm,
    Piece,
    answer_text,
    as_text,
    convert_parts,
    function_tool,
    parts_of,
)
from tunery.jsonl import JsonMapping, JsonObject

_BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")


class Anthropic(MessageForm):
    """See the module."""

    name: ClassVar = "blocks of Claude's messages"

    def fits(self, message: JsonMapping) -> bool:
        return any(part.get("type") in _BLOCKS for part in parts_of(message))

    def convert(self, message: JsonMapping) -> list[JsonObject]:
        return convert_parts(message, str(message.get("role")), parts_of(message), _piece)

    def tools(self, entry: JsonMapping) -> list[JsonObject] | None:
        if "input_schema" not in entry:
            return None
        return [function_tool(entry.get("name"), entry.get("description"), entry["input_schema"])]


def _piece(part: JsonMapping) -> Piece | None:
    if isinstance(part.get("text"), str):
        return Piece("text", part["text"])
    match part.get("type"):
        case "thinking" | "redacted_thinking":
            return Piece("thought", as_text(part.get("thinking") or ""))  # Mistral's is a list of text parts
        case "tool_use":
            return Piece("call", call=str(part.get("id") or ""), tool=part.get("name", ""), arguments=part.get("input"))
        case "tool_result":
            said = answer_text(part.get("content"))
            return None if said is None else Piece("answer", said, call=str(part.get("tool_use_id") or ""))
        case _:
            return None
