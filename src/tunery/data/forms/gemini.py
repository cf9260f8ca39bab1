"""Gemini's contents: roles user and model, parts with text, functionCall and functionResponse."""

from __future__ import annotations

from typing import ClassVar

from tunery.data.forms.base import MessageForm, Piece, as_text, convert_parts, function_tool
from tunery.jsonl import JsonMapping, JsonObject, is_list, is_object

_ROLES = {"model": "assistant", "function": "tool"}


class Gemini(MessageForm):
    """See the module."""

    name: ClassVar = "Gemini contents"
    keys: ClassVar = {"content": "parts"}

    def fits(self, message: JsonMapping) -> bool:
        return "parts" in message or message.get("role") == "model"

    def convert(self, message: JsonMapping) -> list[JsonObject]:
        role = str(message.get("role", "user"))
        role = _ROLES.get(role, role)
        if "parts" not in message:
            return [{**message, "role": role}]
        parts = message["parts"] if is_list(message["parts"]) else [message["parts"]]
        parts = [{"text": part} if isinstance(part, str) else part for part in parts]
        return convert_parts(message, role, parts, _piece)

    def tools(self, entry: JsonMapping) -> list[JsonObject] | None:
        declared = entry.get("functionDeclarations", entry.get("function_declarations"))
        if not is_list(declared):
            return None
        return [
            function_tool(
                each.get("name"), each.get("description"), each.get("parameters", each.get("parametersJsonSchema"))
            )
            for each in declared
            if is_object(each)
        ]


def _piece(part: JsonMapping) -> Piece | None:
    if isinstance(part.get("text"), str):
        return Piece("thought" if part.get("thought") is True else "text", part["text"])
    call = part.get("functionCall", part.get("function_call"))
    if is_object(call):
        return Piece("call", call=str(call.get("id") or ""), tool=call.get("name", ""), arguments=call.get("args"))
    answer = part.get("functionResponse", part.get("function_response"))
    if is_object(answer):
        return Piece(
            "answer",
            as_text(answer.get("response", "")),
            call=str(answer.get("id") or ""),
            tool=str(answer.get("name") or ""),
        )
    return None
