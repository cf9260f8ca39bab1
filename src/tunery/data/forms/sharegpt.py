"""ShareGPT's messages ({from, value}), with tool turns as LLaMA-Factory (function_call, observation) and Hermes
(<tool_call>, <tool_response>) write them."""

from __future__ import annotations

from typing import ClassVar

from tunery.data.forms.base import MessageForm
from tunery.data.forms.hermes import from_blocks, read_calls
from tunery.jsonl import JsonMapping, JsonObject

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "ai"), "assistant"),
}
_CALLS = ("function_call", "tool_call")
_ANSWERS = ("observation", "function_response", "tool_response", "tool")
_OURS = ("system", "developer", "user", "assistant", "tool", "function")


class ShareGPT(MessageForm):
    """See the module."""

    name: ClassVar = "ShareGPT messages"
    keys: ClassVar = {"role": "from", "content": "value"}
    merges: ClassVar = True
    calls_in_text: ClassVar = True

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
            calls = read_calls([content])
            rest = {key: value for key, value in message.items() if key != "content"}
            return [{**rest, "role": "assistant", "tool_calls": calls or content}]  # the check names what is no call
        message["role"] = "tool" if role in _ANSWERS else _ROLES.get(role, role)
        return from_blocks(message)
