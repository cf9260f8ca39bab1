"""Bedrock's Converse API: content in parts without a type (text, toolUse, toolResult, reasoningContent)."""

from __future__ import annotations

from typing import ClassVar

from tunery.data.forms.base import MessageForm, Piece, answer_text, convert_parts, function_tool, parts_of
from tunery.jsonl import JsonMapping, JsonObject, is_object

_PARTS = ("text", "toolUse", "toolResult", "reasoningContent")


class Bedrock(MessageForm):
    """See the module."""

    name: ClassVar = "parts of Bedrock's Converse"

    def fits(self, message: JsonMapping) -> bool:
        return any(part.get("type") is None and any(key in part for key in _PARTS) for part in parts_of(message))

    def convert(self, message: JsonMapping) -> list[JsonObject]:
        return convert_parts(message, str(message.get("role")), parts_of(message), _piece)

    def tools(self, entry: JsonMapping) -> list[JsonObject] | None:
        spec = entry.get("toolSpec")
        if not is_object(spec):
            return None
        schema = spec.get("inputSchema")
        return [
            function_tool(
                spec.get("name"), spec.get("description"), schema.get("json", schema) if is_object(schema) else schema
            )
        ]


def _piece(part: JsonMapping) -> Piece | None:
    if isinstance(part.get("text"), str):
        return Piece("text", part["text"])
    if is_object(call := part.get("toolUse")):
        return Piece(
            "call", call=str(call.get("toolUseId") or ""), tool=call.get("name", ""), arguments=call.get("input")
        )
    if is_object(answer := part.get("toolResult")):
        said = answer_text(answer.get("content"))
        return None if said is None else Piece("answer", said, call=str(answer.get("toolUseId") or ""))
    if is_object(thought := part.get("reasoningContent")):
        inner = thought.get("reasoningText")
        return Piece("thought", str(inner.get("text") or "") if is_object(inner) else "")
    return None
