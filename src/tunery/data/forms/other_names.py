"""Messages that only name things in another way: roles as in Cohere's files (User, Chatbot), speaker, author or
type (LangChain) for the role, text or message for the content."""

from __future__ import annotations

from typing import ClassVar

from tunery.data.forms.base import MessageForm
from tunery.jsonl import JsonMapping, JsonObject

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatbot", "bot", "ai", "model"), "assistant"),
    **{role: role for role in ("system", "developer", "tool", "function")},
}
_OURS = ("system", "developer", "user", "assistant", "tool", "function")
_ROLE_KEYS = ("role", "author", "speaker", "sender", "type")
_CONTENT_KEYS = ("content", "text", "message", "value")


class OtherNames(MessageForm):
    """See the module."""

    name: ClassVar = "messages with other names for role or content"

    def fits(self, message: JsonMapping) -> bool:
        names = _names(message)
        if names is None:
            return False
        role, _ = names
        return names != ("role", "content") or message[role] not in _OURS

    def convert(self, message: JsonMapping) -> list[JsonObject]:
        role, content = _names(message) or ("role", "content")
        rest = {key: value for key, value in message.items() if key not in (role, content)}
        said = {"content": message[content]} if content in message else {}
        return [{"role": _ROLES[message[role].strip().casefold()], **said, **rest}]


def _names(message: JsonMapping) -> tuple[str, str] | None:
    """(key of the role, key of the content) of a message that has one of each, and a role that is known."""
    roles = [key for key in _ROLE_KEYS if str(message.get(key)).strip().casefold() in _ROLES]
    contents = [key for key in _CONTENT_KEYS if key in message]
    if len(roles) != 1 or len(contents) > 1:
        return None
    return roles[0], contents[0] if contents else "content"
