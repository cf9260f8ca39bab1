"""Examples as lines of OpenAI's fine-tuning files.

| kind | becomes |
| --- | --- |
| chat | `{"messages": …, "tools": …}`, weights kept |
| classification | the same question that a model trained here is asked, and the label as the answer |
| completion | the prompt as the user's message, the completion as the answer |
| preference | `{"input": {"messages": …}, "preferred_output": […], "non_preferred_output": […]}` |
| text | refused: there is nothing to ask |

The task's system message stands before conversations that have none, as it does here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tunery.data.example import DataSet, Example, Message
from tunery.data.wording import Wording
from tunery.errors import ConfigError, DataError

FEWEST_ROWS = 10
"""OpenAI's rule."""

PROBLEMS_SHOWN = 20

_NOT_TAKEN = ("reasoning_content",)


def require_trainable(data: DataSet) -> None:
    """Refuse rows that no server takes.

    Raises:
        ConfigError: the rows are plain text.
        DataError: there are too few.
    """
    if data.kind == "text":
        raise ConfigError(
            "a hosted model learns answers, and these rows are plain text (kind text)",
            "give prompts and completions (data.kind: completion), or train a model here: "
            "--set model=smollm2-135m-instruct",
        )
    if len(data.train) < FEWEST_ROWS:
        raise DataError(
            f"there are {len(data.train)} training rows, and a hosted model needs at least {FEWEST_ROWS}",
            "add rows, or hold out fewer (data.validation)",
        )


def lines(examples: Sequence[Example], wording: Wording) -> list[str]:
    """One JSON object an example, in order.

    Raises:
        DataError: rows that a hosted model does not take, each with its place.
    """
    problems = [f"{example.where}: {problem}" for example in examples for problem in _problems(example)]
    if problems:
        shown = problems[:PROBLEMS_SHOWN]
        more = [f"… and {len(problems) - len(shown):,} more"] if len(problems) > len(shown) else []
        raise DataError("\n".join(["a hosted model does not take these rows:", *shown, *more]), "change or remove them")
    return [json.dumps(_row(example, wording), ensure_ascii=False) for example in examples]


def _problems(example: Example) -> Iterable[str]:
    messages = (*example.messages, *example.chosen, *example.rejected)
    for key in _NOT_TAKEN:
        if any(key in message for message in messages):
            yield f"messages with {key} are not taken there"
    if example.kind == "completion" and not example.prompt.strip():
        yield "the prompt is empty, and a conversation begins with what the user says"
    for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
        if len(answer) > 1:
            yield f"the {name} answer has {len(answer)} messages, and one is taken there"


def _row(example: Example, wording: Wording) -> dict[str, Any]:
    if example.kind == "preference":
        return {
            "input": _with_tools(wording.with_system(example.messages), example),
            "preferred_output": _plain(example.chosen),
            "non_preferred_output": _plain(example.rejected),
        }
    if example.kind == "completion":
        messages = [*asked(example, wording), {"role": "assistant", "content": example.completion}]
    else:
        messages = wording.conversation(example)
    return _with_tools(messages, example)


def asked(example: Example, wording: Wording) -> list[Message]:
    """The messages after which the model answers the last time."""
    if example.kind == "classification":
        return wording.question(example.text)
    if example.kind == "completion":
        return wording.with_system([{"role": "user", "content": example.prompt}])
    if example.kind == "preference":
        return wording.with_system(example.messages)
    return wording.with_system(example.messages[:-1])


def _with_tools(messages: Iterable[Message], example: Example) -> dict[str, Any]:
    return {"messages": _plain(messages), **({"tools": list(example.tools)} if example.tools else {})}


def _plain(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI writes them: content is null beside tool calls."""
    return [
        {**message, "content": None} if message.get("tool_calls") and not message.get("content") else dict(message)
        for message in messages
    ]
