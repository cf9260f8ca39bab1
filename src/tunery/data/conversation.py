"""Conversations in rows: messages and tools in OpenAI's form, checked field by field.

The form is that of OpenAI's fine-tuning files (messages with role, content, weight, tool_calls; tools). ShareGPT's
{from, value} messages are translated first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any

from tunery.data.example import ExampleFields, Problem
from tunery.data.source import known_here
from tunery.jsonl import JsonMapping, JsonObject, is_list, is_object
from tunery.text import did_you_mean

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_MESSAGE_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "refusal", "reasoning_content")
QUOTES = "put it in quotes"


class Report:
    """Collects the problems of one row."""

    def __init__(self, file: str, line: int):
        self.file, self.line = file, line
        self.problems: list[Problem] = []

    def add(self, field: str, message: str, fix: str) -> None:
        """Note a problem with the field at this path of the row."""
        self.problems.append(Problem(self.file, self.line, field, message, fix))


def describe(value: object) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: tuple[tuple[type | UnionType, str], ...] = (
        (int | float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((name for type_, name in names if isinstance(value, type_)), f"a {type(value).__name__}")


def report_missing(report: Report, row: JsonMapping, key: str, at: str = "") -> None:
    """Note that `row` (found at the path `at`) lacks a key, and which one may have been meant."""
    report.add(f"{at}{key}", "missing", did_you_mean(key, row) or f"add {key} to the row")


# --------------------------------------------------------------------------- conversations


def read_list(report: Report, field: str, value: object, fix: str) -> list[Any] | None:
    """A list, which a table may hold as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
            json.dumps(value, ensure_ascii=False).encode()  # refuses halves of surrogate pairs
        except (ValueError, RecursionError):
            report.add(field, "the text is not valid JSON", fix)
            return None
    if is_list(value):
        return value
    report.add(field, f"a list is needed, not {describe(value)}", fix)
    return None


def read_conversation(report: Report, row: JsonMapping, columns: Mapping[str, str]) -> ExampleFields:
    """The fields of a chat example; {} where there is a problem."""
    key = columns["messages"]
    if key not in row:
        report_missing(report, row, key)
        return {}
    value = read_list(report, key, row[key], 'write [{"role": …, "content": …}, …]')
    tools_key = columns.get("tools", "tools")
    tools = read_tools(report, tools_key, row.get(tools_key))
    if value is None:
        return {}
    messages = read_messages(report, key, value, set())
    trained = [index for index, m in enumerate(messages) if m.get("role") == "assistant" and m.get("weight") != 0]
    if not trained:
        report.add(
            key,
            "nothing to train on: no assistant message, or all have weight 0" if messages else "empty",
            "add the assistant's answer, or remove the row",
        )
        return {}
    return {"messages": tuple(messages[: trained[-1] + 1]), "tools": tools}


def read_messages(report: Report, field: str, value: Sequence[object], calls: set[str]) -> list[JsonObject]:
    """The messages of a list. `calls`: ids of the tool calls made before it, to which its own are added."""
    return [read_message(report, f"{field}[{index}]", message, calls) for index, message in enumerate(value)]


def read_message(report: Report, at: str, message: object, calls: set[str]) -> JsonObject:
    """A message in OpenAI's form, without keys that are null (tables fill absent ones so). `calls`: ids seen so far."""
    if not is_object(message):
        report.add(at, f"a message is an object, not {describe(message)}", 'write {"role": …, "content": …}')
        return {}
    message, names = _from_sharegpt({key: value for key, value in message.items() if value is not None})
    role = _role(report, f"{at}.{names['role']}", message)
    for key in sorted(set(message) - set(_MESSAGE_KEYS)):
        _unknown_key(report, at, key)
    result: JsonObject = {"role": role}
    if "tool_calls" in message:
        result["tool_calls"] = _tool_calls(report, f"{at}.tool_calls", message["tool_calls"], role, calls)
    _weight(report, f"{at}.weight", message, role, result)
    result["content"] = _content(report, f"{at}.{names['content']}", message, result)
    _tool_call_id(report, f"{at}.tool_call_id", message, role, calls)
    for key in ("name", "reasoning_content", "tool_call_id"):
        if key in message:
            if not isinstance(message[key], str):
                report.add(f"{at}.{key}", f"a text is needed, not {describe(message[key])}", QUOTES)
            result[key] = message[key]
    return result


def _from_sharegpt(message: JsonObject) -> tuple[JsonObject, dict[str, str]]:
    """The message with our keys, and our key → the key in the file."""
    if "role" in message or "from" not in message:
        return message, {"role": "role", "content": "content"}
    message = {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}
    if isinstance(message["role"], str):
        message["role"] = _SHAREGPT_ROLES.get(message["role"], message["role"])
    return message, {"role": "from", "content": "value"}


def _role(report: Report, field: str, message: JsonObject) -> str:
    role = message.get("role")
    if role is None:
        report.add(field, "missing", f"one of {', '.join(_ROLES)}")
    elif role == "function":
        report.add(
            field, "the role function is no longer used", "write role tool, with the tool_call_id that it answers"
        )
    elif role not in _ROLES:
        report.add(field, f"unknown role {str(role)[:40]!r}", known_here(str(role), _ROLES))
    return role if isinstance(role, str) else ""


def _unknown_key(report: Report, at: str, key: str) -> None:
    if key == "function_call":
        report.add(f"{at}.{key}", "function_call is no longer used", "write it as an entry of tool_calls")
    elif key == "audio":
        report.add(f"{at}.{key}", "audio is not supported", "remove it; text is what is trained")
    else:
        report.add(f"{at}.{key}", "unknown key", known_here(key, _MESSAGE_KEYS))


def _weight(report: Report, field: str, message: JsonObject, role: str, result: JsonObject) -> None:
    weight = message.get("weight")
    if weight is None:
        return
    if role != "assistant":
        report.add(field, "only assistant messages have a weight", "remove it")
    elif isinstance(weight, bool) or weight not in (0, 1):
        report.add(
            field, f"a weight is 0 or 1, not {str(weight)[:40]}", "write 1 to train the message, 0 to leave it out"
        )
    else:
        result["weight"] = int(weight)


def _content(report: Report, field: str, message: JsonObject, result: JsonObject) -> str:
    """The message's text. A refusal is what the assistant says; it stands in for absent content."""
    content, role = message.get("content"), result["role"]
    if is_list(content):
        content = _joined_parts(report, field, content)
    refusal = message.get("refusal")
    if role == "assistant" and isinstance(refusal, str) and refusal.strip():
        if content:
            report.add(field, "the message has both content and a refusal", "keep one of them")
        return refusal
    if content is None:
        if not result.get("tool_calls"):
            report.add(field, "missing", "write the text of the message")
        return ""
    if not isinstance(content, str):
        report.add(field, f"a text is needed, not {describe(content)}", QUOTES)
        return ""
    trained = role == "assistant" and result.get("weight") != 0
    if trained and not content.strip() and not result.get("tool_calls"):
        report.add(field, "the answer is empty", "write the answer, or give the message weight 0")
    return content


def _joined_parts(report: Report, field: str, parts: Sequence[object]) -> str:
    texts: list[str] = []
    for index, part in enumerate(parts):
        at = f"{field}[{index}]"
        kind = part.get("type") if is_object(part) else None
        text = part.get("text") if is_object(part) else None
        if kind != "text" or not isinstance(text, str):
            what = "not a text part" if kind in (None, "text") else f"parts of type {str(kind)[:40]} are not supported"
            report.add(at, what, 'write {"type": "text", "text": …}')
        else:
            texts.append(text)
    return "".join(texts)


# --------------------------------------------------------------------------- tools


def _tool_call_id(report: Report, field: str, message: JsonObject, role: str, calls: set[str]) -> None:
    call = message.get("tool_call_id")
    if role != "tool":
        if call is not None:
            report.add(field, "only tool messages answer a tool call", "remove it, or write role tool")
    elif call is None:
        report.add(field, "missing", "name the id of the tool call that this message answers")
    elif not isinstance(call, str) or call not in calls:
        known = known_here(str(call), sorted(calls)) if calls else "put the assistant's tool_calls before it"
        report.add(field, f"no earlier message makes the tool call {str(call)[:40]!r}", known)


def _tool_calls(report: Report, field: str, entries: object, role: str, calls: set[str]) -> list[JsonObject]:
    if role != "assistant":
        report.add(field, "only the assistant calls tools", "remove it, or write role assistant")
    result: list[JsonObject] = []
    for index, entry in enumerate(read_list(report, field, entries, "write a list of calls, or leave it out") or ()):
        at = f"{field}[{index}]"
        if not is_object(entry):
            report.add(at, f"a tool call is an object, not {describe(entry)}", "write id, type and function")
            continue
        call = entry.get("id")
        if not isinstance(call, str) or not call:
            report.add(f"{at}.id", "missing" if call is None else "a text is needed", "give each call its own id")
        else:
            calls.add(call)
        function = _function(report, at, entry)
        _arguments(report, f"{at}.function.arguments", function)
        result.append({"id": call, "type": "function", "function": function})
    return result


def _function(report: Report, at: str, entry: JsonObject) -> JsonObject:
    """The function of a tool or of a tool call, which share the form {type: function, function: {name, …}}."""
    if entry.get("type") != "function":
        report.add(f"{at}.type", "missing" if entry.get("type") is None else "unknown type", 'write "type": "function"')
    function = entry.get("function")
    if not is_object(function):
        report.add(f"{at}.function", f"an object is needed, not {describe(function)}", 'write {"name": …, …}')
        return {}
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        report.add(f"{at}.function.name", "missing", "name the function")
    return function


def _arguments(report: Report, field: str, function: JsonObject) -> None:
    arguments = function.get("arguments")
    example = r'write the arguments as JSON in a text: "{\"city\": \"Oslo\"}"'
    if not isinstance(arguments, str):
        report.add(field, f"a text of JSON is needed, not {describe(arguments)}", example)
        return
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        report.add(field, "not valid JSON", example)


def read_tools(report: Report, key: str, value: object) -> tuple[JsonObject, ...]:
    """The tools offered, in OpenAI's form; none for null."""
    if value is None or value == "":
        return ()
    value = read_list(report, key, value, 'write [{"type": "function", "function": {"name": …}}], or leave it out')
    if value is None:
        return ()
    for index, tool in enumerate(value):
        if is_object(tool):
            _function(report, f"{key}[{index}]", tool)
        else:
            report.add(f"{key}[{index}]", f"a tool is an object, not {describe(tool)}", "write type and function")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # a table can hold dates and bytes, or nest without end
        report.add(key, "a tool can only hold what JSON can", "write dates and the like as text")
    return tuple(value)
