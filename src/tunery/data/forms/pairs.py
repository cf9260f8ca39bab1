"""Turns as pairs: a question and its answer in one object, with the system message in the first (XTuner; Capybara)."""

from __future__ import annotations

from typing import ClassVar

from tunery.data.forms.base import MessageForm
from tunery.jsonl import JsonMapping, JsonObject


class Pairs(MessageForm):
    """See the module."""

    name: ClassVar = "turns with input and output"

    def fits(self, message: JsonMapping) -> bool:
        return "role" not in message and all(isinstance(message.get(key), str) for key in ("input", "output"))

    def convert(self, message: JsonMapping) -> list[JsonObject]:
        rest = {key: value for key, value in message.items() if key not in ("system", "input", "output")}
        opening = [{"role": "system", "content": message["system"]}] if message.get("system") else []
        asked = {"role": "user", "content": message["input"]}
        return [*opening, asked, {"role": "assistant", "content": message["output"], **rest}]
