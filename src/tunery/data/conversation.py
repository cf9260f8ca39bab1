"""Conversations in rows: messages in OpenAI's form, checked field by field.

The form is that of OpenAI's fine-tuning files (messages with role, content, weight, tool_calls; tools). Messages in
other forms (tunery.data.forms) are converted first, and the rows in which that happened are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from tunery.data.example import ExampleFields
from tunery.data.forms import FORMS
from tunery.data.forms.base import MessageForm, as_text
from tunery.data.row_report import (
    QUOTES,
    Report,
    describe,
    is_written,
    read_list,
    read_written,
    report_missing,
    says_nothing,
)
from tunery.data.source import known_here, printable
from tunery.data.tool_calls import CallLedger, read_tool_call_id, read_tool_calls, read_tools
from tunery.jsonl import JsonMapping, JsonObject, is_list, is_object
from tunery.text import did_you_mean

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "refusal", "reasoning_content")
_REASONING_KEYS = ("thinking", "reasoning")
"""Other names of reasoning_content (Ollama; OpenRouter and vLLM)."""
_TRAIN_KEYS = ("train", "training", "loss")
"""Say true or false (or 1 or 0) where we say weight 1 or 0 (axolotl; XTuner)."""

LIST = 'write [{"role": …, "content": …}, …]'

Messages = list[JsonObject]


@dataclass(frozen=True)
class Given:
    """A message as it will be checked.

    Attributes:
        message: in OpenAI's form.
        at: its path in the row.
        keys: our key → the key in the file.
        form: it was converted from; None for OpenAI's.
    """

    message: object
    at: str
    keys: Mapping[str, str] = field(default_factory=dict[str, str])
    form: MessageForm | None = None

    def place(self, key: str) -> str:
        """The path of one of our keys."""
        return f"{self.at}.{self.keys.get(key, key)}"


def read_conversation(report: Report, row: JsonMapping, columns: Mapping[str, str]) -> ExampleFields:
    """The fields of a chat example; {} where there is a problem."""
    key = columns["messages"]
    if key not in row:
        report_missing(report, row, key)
        return {}
    value = read_list(report, key, row[key], LIST)
    tools_key = columns.get("tools", "tools")
    tools = read_tools(report, tools_key, row.get(tools_key))
    if value is None:
        return {}
    ledger = CallLedger()
    messages = read_messages(report, key, value, ledger)
    messages = put_system(report, row, columns, messages)
    messages += _answer_beside(report, row, columns, messages)
    trained = [index for index, m in enumerate(messages) if m.get("role") == "assistant" and m.get("weight") != 0]
    if not trained:
        report.add(
            key,
            "nothing to train on: no assistant message, or all have weight 0" if messages else "empty",
            "add the assistant's answer, or remove the row",
        )
        return {}
    report.shortened = len(messages) > trained[-1] + 1
    return {"messages": tuple(messages[: trained[-1] + 1]), "tools": tools}


def _answer_beside(report: Report, row: JsonMapping, columns: Mapping[str, str], messages: Messages) -> Messages:
    """The answer in a column of its own, for a conversation that ends before it."""
    key = columns.get("completion")
    answer = None if key is None else row.get(key)
    if key is None or says_nothing(answer):
        return []
    if messages and messages[-1].get("role") == "assistant":
        if str(answer).strip() not in messages[-1]["content"]:
            report.add(
                key,
                "the conversation ends with an answer, and this is another",
                f"keep one of them, or leave this column aside with data.ignore_columns: [{printable(key)}]",
            )
        return []
    if not isinstance(answer, str):
        report.add(key, f"a text is needed, not {describe(answer)}", QUOTES)
        return []
    return [{"role": "assistant", "content": answer}]


# --------------------------------------------------------------------------- system messages


def put_system(report: Report, row: JsonMapping, columns: Mapping[str, str], messages: Messages) -> Messages:
    """The conversation with the system message that a column of its own holds."""
    key = columns.get("system")
    text = "" if key is None else _system_text(report, key, row.get(key))
    if key is None or not text.strip():
        return messages
    if messages and messages[0].get("role") in ("system", "developer"):
        if messages[0].get("content") != text:
            report.add(key, "the conversation begins with a system message, and this is another", "keep one of them")
        return messages
    return [{"role": "system", "content": text}, *messages]


def _system_text(report: Report, key: str, value: object) -> str:
    """The text of a system message, as a text, a message, or parts (Bedrock, Gemini)."""
    if says_nothing(value):
        return ""
    if is_object(value):
        value = value.get("parts", value.get("content", value.get("text", value)))
    if is_list(value) and all(is_object(part) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        report.add(key, f"the text of a system message is needed, not {describe(value)}", QUOTES)
        return ""
    return value


# --------------------------------------------------------------------------- messages


def read_messages(report: Report, field: str, value: Sequence[object], ledger: CallLedger) -> Messages:
    """The messages of a list. `ledger`: the tool calls made before it, to which its own are added."""
    given = converted(
        report, [Given(message, f"{field}[{index}]") for index, message in _with_roles(report, field, value)]
    )
    return [read_message(report, message, ledger) for message in given]


def _with_roles(report: Report, field: str, value: Sequence[object]) -> list[tuple[int, object]]:
    """(place, message) of each message of a list. Where all are texts, or pairs of texts, two speakers take turns, the
    user first."""
    if value and all(map(is_written, value)):  # each of them is a message as text
        return [(i, read_written(report, field, str(text), LIST)) for i, text in enumerate(value)]
    pairs = [turn for turn in value if is_list(turn) and len(turn) == 2]
    texts = [text for pair in pairs for text in pair] if len(pairs) == len(value) else value
    if not value or not all(isinstance(text, str) for text in texts):
        return list(enumerate(value))
    report.converted.add("turns as texts, the user's first")
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [(i // (len(texts) // len(value)), turn) for i, turn in enumerate(turns)]


def converted(report: Report, given: Sequence[Given]) -> list[Given]:
    """The messages in OpenAI's form, without keys that say nothing: null (tables fill absent ones so), or unknown to us
    and empty (dumps of the SDK's objects have many)."""
    result: list[Given] = []
    for one in given:
        if not is_object(one.message):
            result.append(one)
            continue
        message = {
            key: value
            for key, value in one.message.items()
            if value is not None and (key in ("role", "content", "from", "value") or not says_nothing(value))
        }
        form = next((form for form in FORMS if form.fits(message)), None)
        if form is None:
            result.append(Given(message, one.at, one.keys))
            continue
        report.converted.add(form.name)
        for new in form.convert(message):
            last = result[-1] if result and result[-1].form is form and form.merges else None
            if last is not None and is_object(last.message) and _goes_on(last.message, new):
                result[-1] = Given(_merged(last.message, new), last.at, form.keys, form)
            else:
                result.append(Given(new, one.at, form.keys, form))
    return result


def _goes_on(before: JsonObject, message: JsonObject) -> bool:
    """Whether a message is part of the assistant's message before it: what follows a thought, or calls a tool."""
    if not before.get("role") == message.get("role") == "assistant":
        return False
    if "tool_calls" in message and "content" not in message:
        return True
    return "content" not in before and "tool_calls" not in before


def _merged(before: JsonObject, message: JsonObject) -> JsonObject:
    calls = [*before.get("tool_calls", ()), *message.get("tool_calls", ())]
    return {**before, **message, **({"tool_calls": calls} if calls else {})}


def read_message(report: Report, given: Given, ledger: CallLedger, trained: bool = True) -> JsonObject:
    """A message in OpenAI's form.

    Args:
        ledger: the tool calls so far.
        trained: what the assistant says is learned, unless its weight is 0; then it may not be empty.
    """
    message, at = given.message, given.at
    if not is_object(message):
        report.add(at, f"a message is an object, not {describe(message)}", 'write {"role": …, "content": …}')
        return {}
    message = _our_weight(report, _our_reasoning(report, at, _without_ignored(report, message)))
    role = _role(report, given.place("role"), message)
    for key in sorted(set(message) - set(_MESSAGE_KEYS)):
        _unknown_key(report, at, key)
    result: JsonObject = {"role": role}
    if "tool_calls" in message:
        calls = read_tool_calls(report, f"{at}.tool_calls", message["tool_calls"], role, ledger)
        if calls:
            result["tool_calls"] = calls
    _weight(report, f"{at}.weight", message, role, result)
    result["content"] = _content(report, given.place("content"), message, result, trained)
    in_text = given.form is not None and given.form.calls_in_text and role == "tool" and not ledger.calls
    if not in_text and (call := read_tool_call_id(report, at, message, role, ledger)) is not None:
        result["tool_call_id"] = call
    for key in ("name", "reasoning_content"):
        if key in message:
            if not isinstance(message[key], str):
                report.add(f"{at}.{key}", f"a text is needed, not {describe(message[key])}", QUOTES)
            result[key] = message[key]
    return result


def _our_reasoning(report: Report, at: str, message: JsonObject) -> JsonObject:
    """The message with its reasoning under our key."""
    others = [key for key in _REASONING_KEYS if isinstance(message.get(key), str)]
    if not others:
        return message
    texts = [message[key] for key in (*others, "reasoning_content") if key in message]
    if len(set(texts)) > 1:
        report.add(f"{at}.{others[0]}", "the message has its reasoning under two keys", "write reasoning_content alone")
    else:
        report.converted.add(f"reasoning under the key {others[0]}")
    rest = {key: value for key, value in message.items() if key not in others}
    return {**rest, "reasoning_content": texts[-1]}


def _our_weight(report: Report, message: JsonObject) -> JsonObject:
    """The message with what says whether it is trained as a weight."""
    key = next((key for key in _TRAIN_KEYS if isinstance(message.get(key), int) and message[key] in (0, 1)), None)
    if key is None or "weight" in message:
        return message
    report.converted.add(f"weight under the key {key}")
    return {**{name: value for name, value in message.items() if name != key}, "weight": int(message[key])}


def _without_ignored(report: Report, message: JsonObject) -> JsonObject:
    """The message without the keys that the user leaves aside."""
    aside = (message.keys() & report.ignored) - set(_MESSAGE_KEYS)
    report.set_aside |= aside
    return {key: value for key, value in message.items() if key not in aside} if aside else message


def _role(report: Report, field: str, message: JsonObject) -> str:
    role = message.get("role")
    if role is None:
        report.add(field, "missing", f"one of {', '.join(_ROLES)}")
    elif role not in _ROLES:
        report.add(field, f"unknown role {str(role)[:40]!r}", known_here(str(role), _ROLES))
    return role if isinstance(role, str) else ""


def _unknown_key(report: Report, at: str, key: str) -> None:
    if key == "audio":
        report.add(f"{at}.{key}", "audio is not supported", "remove it; text is what is trained")
    else:
        meant = did_you_mean(key, _MESSAGE_KEYS)
        known = f"known here: {', '.join(_MESSAGE_KEYS)}"
        aside = f"leave it aside with data.ignore_columns: [{printable(key)}], or " if report.file else ""  # a request
        fix = meant or f"{aside}remove it;"
        report.add(f"{at}.{key}", "unknown key", f"{fix} {known}")


def _weight(report: Report, field: str, message: JsonObject, role: str, result: JsonObject) -> None:
    weight = message.get("weight")
    if weight is None or (role != "assistant" and weight == 0):  # what others say is not trained anyway
        return
    if role != "assistant":
        report.add(field, "only assistant messages are trained, and have a weight", "remove it, or write 0")
    elif isinstance(weight, bool) or weight not in (0, 1):
        report.add(
            field, f"a weight is 0 or 1, not {str(weight)[:40]}", "write 1 to train the message, 0 to leave it out"
        )
    else:
        result["weight"] = int(weight)


def _content(report: Report, field: str, message: JsonObject, result: JsonObject, trained: bool) -> str:
    """The message's text. A refusal is what the assistant says; it stands in for absent content."""
    role, before = result["role"], len(report.problems)
    content, refusal = _usual_content(report, role, message.get("content")), message.get("refusal")
    if is_list(content):
        content, refused = _joined_parts(report, field, content)
        refusal = refusal or refused
    if len(report.problems) > before:
        return ""
    if role == "assistant" and isinstance(refusal, str) and refusal.strip():
        if content:
            report.add(field, "the message has both content and a refusal", "keep one of them")
        return refusal
    if content is None:
        if "tool_calls" not in message:
            report.add(field, "missing", "write the text of the message")
        return ""
    if not isinstance(content, str):
        fix = "write it as a text" if is_object(content) else QUOTES
        report.add(field, f"a text is needed, not {describe(content)}", fix)
        return ""
    trained = trained and role == "assistant" and result.get("weight") != 0
    if trained and not content.strip() and "tool_calls" not in message:
        report.add(field, "the answer is empty", "write the answer, or give the message weight 0")
    return content


def _part_kind(part: JsonObject) -> object:
    """The type of a part; of one that does not say it, what it holds (text, image, fileData)."""
    return part.get("type") or ("text" if "text" in part else next(iter(part), None))


def _usual_content(report: Report, role: str, content: object) -> object:
    """Content as a text or parts, where it is a single part, or what a tool answers in its own form."""
    if is_object(content) and isinstance(content.get("text"), str):
        return [content]
    if role == "tool" and content is not None and not isinstance(content, str | list):
        report.converted.add("answers of tools as objects")
        return as_text(content)
    return cast("object", content)


_TEXT_PARTS = ("text", "input_text", "output_text")


def _joined_parts(report: Report, field: str, parts: Sequence[object]) -> tuple[str, str]:
    """(what the parts of a message say, what they refuse)."""
    said = {"text": "", "refusal": ""}
    for index, part in enumerate(parts):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = _part_kind(part) if is_object(part) else None
        key = "text" if kind in _TEXT_PARTS else "refusal"
        text = part.get(key) if is_object(part) and kind in (*_TEXT_PARTS, "refusal") else None
        if isinstance(text, str):
            said[key] += text
            if kind not in ("text", "refusal"):
                report.converted.add(f"parts of type {kind}")
            continue
        known = kind is None or kind in (*_TEXT_PARTS, "refusal")
        what = "not a text part" if known else f"parts of type {str(kind)[:40]} are not supported"
        report.add(f"{field}[{index}]", what, 'write {"type": "text", "text": …}; text is what is trained')
    return said["text"], said["refusal"]
