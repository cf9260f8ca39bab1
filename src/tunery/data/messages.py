"""Messages in OpenAI's form, as chat templates expect them. Training rows and requests to a server both pass here."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tunery.data.example import Message
from tunery.jsonl import JsonMapping, JsonObject


def plain_message(message: Message, knows_developer: bool) -> JsonObject:
    """A message as chat templates expect it: no `weight`, no key that is null, content a text (a refusal, where the
    assistant gave that instead), tool arguments as an object."""
    plain = {key: value for key, value in message.items() if key not in ("weight", "refusal") and value is not None}
    if plain["role"] == "developer" and not knows_developer:
        plain["role"] = "system"
    plain["content"] = _as_text(plain.get("content")) or message.get("refusal") or ""
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_object(call["function"].get("arguments"))}}
            for call in plain["tool_calls"]
        ]
    return plain


def _as_text(content: str | Sequence[JsonMapping] | None) -> str:
    """The text of a message's content, which may come in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if other := [part["type"] for part in content if part["type"] not in ("text", "refusal")]:
        raise ValueError(f"a content part of type {other[0]} is not text")
    return "".join(part[part["type"]] for part in content)


def _as_object(arguments: object) -> object:
    return json.loads(arguments) if isinstance(arguments, str) and arguments else arguments
