"""Requests as the routes hand them to a backend."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.serve.schemas import ChatRequest, CompletionRequest
from tunery.serve.schemas.base import parse


@dataclass(frozen=True)
class Model:
    """What the registry resolves a name to."""

    base: str
    adapter: Path | None = None
    key: str = ""
    id: str = "m"


def chat(messages: Any = "hello", **fields: Any) -> ChatRequest:
    """A conversation; a text is a user's message."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return parse(ChatRequest, json.dumps({"model": "m", "messages": messages, **fields}).encode())


def completion(prompt: Any, **fields: Any) -> CompletionRequest:
    """A text to go on with."""
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": prompt, **fields}).encode())
