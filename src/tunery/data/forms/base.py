"""What a form of messages is. Each form is one file beside this one, and an entry of tunery.data.forms.FORMS."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tunery.jsonl import JsonMapping, JsonObject, is_list, is_object


class MessageForm(ABC):
    """How another program writes messages and tools, and how they become OpenAI's.

    What comes out is checked afterwards as every message is. A tool call may come out without an id, and a tool's
    answer without the id of its call: they are paired by name and order. Arguments may be objects.

    Attributes:
        name: what the note says was converted.
        tools_name: what it says of tools; the same where it is "".
        keys: our key → the key in the file, for the places of problems.
        merges: neighbouring messages of the assistant are parts of one: thoughts, calls, and what is said.
        calls_in_text: calls may be written in words that nobody else can read; a tool's answer then has no call.
    """

    name: ClassVar[str]
    tools_name: ClassVar[str] = ""
    keys: ClassVar[Mapping[str, str]] = {}
    merges: ClassVar[bool] = False
    calls_in_text: ClassVar[bool] = False

    @abstractmethod
    def fits(self, message: JsonMapping) -> bool:
        """Whether a message (without the keys that are null) is of this form."""

    @abstractmethod
    def convert(self, message: JsonMapping) -> list[JsonObject]:
        """The message or messages in OpenAI's form. What cannot be read is left as it is, for the check to name."""

    def tools(self, entry: JsonMapping) -> list[JsonObject] | None:
        """The tool or tools of an entry of `tools` in OpenAI's form; None for an entry of another form."""
        return None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a message: a text, a thought, a tool call or a tool's answer.

    Attributes:
        text: of a text or a thought, or the answer.
        kind: text, thought, call or answer.
        call, tool: id and function of a call, or of the call that is answered; "" where it is not given.
        arguments: of a call.
    """

    kind: str
    text: str = ""
    call: str = ""
    tool: str = ""
    arguments: object = None


def convert_parts(
    message: JsonMapping, role: str, parts: Sequence[object], read: Callable[[JsonMapping], Piece | None]
) -> list[JsonObject]:
    """The messages that the parts of one make up: tools' answers stand for themselves.

    Args:
        message: its other keys are kept (with the last message that is not a tool's answer).
        read: a part; None for one that cannot be read.
    """
    read_parts = [read(part) if is_object(part) else None for part in parts]
    pieces = [piece for piece in read_parts if piece is not None]
    if len(pieces) < len(parts):
        return [_unread(message, role, parts, read_parts)]
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "parts")}
    said = [piece for piece in pieces if piece.kind != "answer"]
    result = [tool_answer(piece.text, piece.call, piece.tool) for piece in pieces if piece.kind == "answer"]
    if said or not result:
        result.append({"role": role, **_said(said), **rest})
    return result


def _said(pieces: Iterable[Piece]) -> JsonObject:
    pieces = list(pieces)
    texts, thoughts = ([p.text for p in pieces if p.kind == kind] for kind in ("text", "thought"))
    calls = [tool_call(piece.tool, piece.arguments, piece.call) for piece in pieces if piece.kind == "call"]
    return {
        **({"content": "".join(texts)} if texts or not calls else {}),
        **({"reasoning_content": "\n".join(thoughts)} if any(thoughts) else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def tool_call(name: object, arguments: object, call: str = "") -> JsonObject:
    """A tool call in OpenAI's form."""
    made: JsonObject = {
        "type": "function",
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
    }
    return {"id": call, **made} if call else made


def tool_answer(content: object, call: str = "", name: str = "") -> JsonObject:
    """The message of a tool in OpenAI's form."""
    ids = {"tool_call_id": call} if call else {}
    return {"role": "tool", **ids, **({"name": name} if name else {}), "content": as_text(content)}


def as_text(value: object) -> str:
    """What a tool answers, as text: texts as they are, parts joined, anything else as JSON."""
    if isinstance(value, str):
        return value
    if is_list(value) and value and all(is_object(part) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _unread(message: JsonMapping, role: str, parts: Sequence[object], pieces: Sequence[Piece | None]) -> JsonObject:
    """A message some of whose parts cannot be read, for the check to name these, each at its place."""
    content = [
        _inside(part) if piece is None else {"type": "text", "text": ""}
        for part, piece in zip(parts, pieces, strict=True)
    ]
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "parts")}
    return {"role": role, "content": content, **rest}


def _inside(part: object) -> object:
    """A part that cannot be read, or what of a tool's answer cannot be."""
    if is_object(part):
        answer = next((part[key] for key in ("toolResult", "functionResponse") if is_object(part.get(key))), part)
        if is_list(content := answer.get("content")):
            return next((one for one in content if _part_text(one) is None), part)
    return part


def answer_text(content: object) -> str | None:
    """What a tool answers in parts, of text or JSON, as text; None where it answers with something else."""
    if not is_list(content):
        return as_text("" if content is None else content)
    texts = [_part_text(part) for part in content]
    return None if None in texts else "".join(text for text in texts if text)


def _part_text(part: object) -> str | None:
    if isinstance(part, str):
        return part
    if not is_object(part):
        return None
    return as_text(part["json"]) if "json" in part else part["text"] if isinstance(part.get("text"), str) else None


def parts_of(message: JsonMapping, key: str = "content") -> list[JsonObject]:
    """The parts of a message; none where it has a text."""
    parts = message.get(key)
    return [part for part in parts if is_object(part)] if is_list(parts) else []


def function_tool(name: object, description: object, parameters: object) -> JsonObject:
    """A tool in OpenAI's form."""
    function: JsonObject = {"name": name}
    if description is not None:
        function["description"] = description
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}
