"""Tools, the calls of them and their answers, checked field by field. The form is OpenAI's (tools; tool_calls)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from tunery.data.forms import FORMS
from tunery.data.row_report import Report, describe, read_json, read_list, says_nothing
from tunery.data.source import known_here
from tunery.data.strict_json import encodable
from tunery.jsonl import JsonObject, is_list, is_object

_ARGUMENTS = r'write the arguments as JSON in a text: "{\"city\": \"Oslo\"}"'
_TOOLS = 'write [{"type": "function", "function": {"name": …}}], or leave it out'
_ID_LENGTH = 9
"""Of the ids that calls are given: what templates of Mistral's models ask for."""

_ARGUMENT_KEYS = ("args", "parameters", "input", "kwargs", "params")
"""Other names of a call's arguments (LangChain; Llama and LLaMA-Factory; Claude)."""
_CONFIG_KEYS = {"functionCallingConfig", "function_calling_config", "retrievalConfig", "toolChoice"}
_OF_A_CALL = ("id", "call_id", "type", "index")

WITHOUT_ID = "tool calls without an id"
OBJECT_ARGUMENTS = "tool arguments as objects"
EMPTY_ARGUMENTS = "tool calls without arguments"
FLAT_CALLS = "tool calls without the word function"


@dataclass
class CallLedger:
    """The tool calls of a conversation so far, and which of them no message has answered.

    Attributes:
        calls: id → name of the function.
        open: ids that are not answered, in order.
    """

    calls: dict[str, str] = field(default_factory=dict[str, str])
    open: list[str] = field(default_factory=list[str])

    def copy(self) -> CallLedger:
        """For what may follow, in one of two ways."""
        return CallLedger(dict(self.calls), list(self.open))

    def make(self, name: str) -> str:
        """The id of a call that was given none."""
        number = len(self.calls) + 1
        while (made := f"call{number:0{_ID_LENGTH - 4}d}") in self.calls:
            number += 1
        self.add(made, name)
        return made

    def add(self, call: str, name: str) -> None:
        """Note a call."""
        self.calls[call] = name
        self.open.append(call)

    def answer(self, call: str) -> None:
        """Note that a call is answered."""
        if call in self.open:
            self.open.remove(call)

    def answered_by(self, name: str) -> str | None:
        """The id of the call that a message without one answers: the first open one of this function, or of any where
        no name is given."""
        return next((call for call in self.open if not name or self.calls[call] == name), None)


def read_tool_call_id(report: Report, at: str, message: JsonObject, role: str, ledger: CallLedger) -> str | None:
    """The id of the call that a tool's message answers; None in other messages, and where there is a problem."""
    call = _id(message.get("tool_call_id"))
    field_ = f"{at}.tool_call_id"
    if role != "tool":
        if call is not None:
            report.add(field_, "only tool messages answer a tool call", "remove it, or write role tool")
        return None
    if call is None:
        name = message.get("name")
        call = ledger.answered_by(name if isinstance(name, str) else "")
        if call is None:
            fix = "name the id of the tool call that this message answers, or put that call before it"
            report.add(field_, f"missing, and no earlier message calls {name!r}" if name else "missing", fix)
            return None
        report.converted.add(WITHOUT_ID)
    elif not isinstance(call, str) or call not in ledger.calls:
        known = known_here(str(call), sorted(ledger.calls)) if ledger.calls else "put the assistant's tool_calls first"
        report.add(field_, f"no earlier message makes the tool call {str(call)[:40]!r}", known)
        return None
    ledger.answer(call)
    return call


def read_tool_calls(report: Report, field: str, entries: object, role: str, ledger: CallLedger) -> list[JsonObject]:
    """The tool calls of a message of the assistant."""
    if role != "assistant":
        report.add(field, "only the assistant calls tools", "remove it, or write role assistant")
    result: list[JsonObject] = []
    for index, entry in enumerate(read_list(report, field, entries, "write a list of calls, or leave it out") or ()):
        at = f"{field}[{index}]"
        if not is_object(entry):
            report.add(at, f"a tool call is an object, not {describe(entry)}", "write id, type and function")
            continue
        entry = {key: value for key, value in entry.items() if value is not None}
        if "function" not in entry and isinstance(entry.get("name"), str):
            report.converted.add(FLAT_CALLS)
            function = {key: part for key, part in entry.items() if key not in _OF_A_CALL}
            entry = {"id": entry.get("id", entry.get("call_id")), "type": "function", "function": function}
        function = _with_arguments(report, at, _function(report, at, {"type": "function", **entry}))
        name = function.get("name")
        call = _id(entry.get("id"))
        if says_nothing(call):
            report.converted.add(WITHOUT_ID)
            call = ledger.make(str(name))
        elif not isinstance(call, str):
            report.add(f"{at}.id", "a text is needed", "give each call its own id")
        else:
            ledger.add(call, str(name))
        arguments = _arguments(report, f"{at}.function.arguments", function.get("arguments"))
        result.append({"id": call, "type": "function", "function": {**function, "arguments": arguments}})
    return result


def _id(value: object) -> object:
    """An id, as a text where it is a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _function(report: Report, at: str, entry: JsonObject) -> JsonObject:
    """The function of a tool or of a tool call, which share the form {type: function, function: {name, …}}."""
    if entry.get("type") != "function":
        report.add(f"{at}.type", "missing" if entry.get("type") is None else "unknown type", 'write "type": "function"')
    function = entry.get("function")
    if not is_object(function):
        report.add(f"{at}.function", f"an object is needed, not {describe(function)}", 'write {"name": …, …}')
        return {}
    function = {key: value for key, value in function.items() if value is not None}
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        report.add(f"{at}.function.name", "missing", "name the function")
    return function


def _with_arguments(report: Report, at: str, function: JsonObject) -> JsonObject:
    """The function of a call, with its arguments under our key."""
    others = [key for key in _ARGUMENT_KEYS if key in function]
    if not others:
        return function
    if len(others) > 1 or "arguments" in function:
        report.add(f"{at}.function.{others[0]}", "the call has its arguments under two keys", "write arguments alone")
        return function
    report.converted.add(f"arguments under the key {others[0]}")
    rest = {key: part for key, part in function.items() if key not in others}
    return {**rest, "arguments": function[others[0]]}


def _arguments(report: Report, field: str, arguments: object) -> str:
    """The arguments as a text of JSON; "{}" where there are none, or a problem."""
    if says_nothing(arguments):
        if arguments != {}:
            report.converted.add(EMPTY_ARGUMENTS)
        return "{}"
    if is_object(arguments):
        report.converted.add(OBJECT_ARGUMENTS)
        return _written(report, field, arguments)
    if not isinstance(arguments, str):
        report.add(field, f"a text of JSON is needed, not {describe(arguments)}", _ARGUMENTS)
        return "{}"
    before = len(report.problems)
    value = read_json(report, field, arguments, _ARGUMENTS)
    if len(report.problems) == before and not is_object(value):
        report.add(field, f"arguments are an object, not {describe(value)}", _ARGUMENTS)
    return arguments


def _written(report: Report, field: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # a table can hold dates and bytes
        report.add(field, "arguments can only hold what JSON can", "write dates and the like as text")
        return "{}"


def read_tools(report: Report, key: str, value: object) -> tuple[JsonObject, ...]:
    """The tools offered, in OpenAI's form; none for null."""
    if says_nothing(value):
        return ()
    if isinstance(value, str) and value.lstrip().startswith(("{", "null")):
        value = read_json(report, key, value, _TOOLS)
        if value is None:
            return ()
    if is_object(value) and value.keys() <= _CONFIG_KEYS:  # Gemini's toolConfig
        return ()
    if is_object(value) and is_list(value.get("tools")):  # Bedrock's
        key, value = f"{key}.tools", value["tools"]
    if is_object(value) and ("function" in value or "name" in value):
        report.converted.add("a single tool instead of a list")
        value = [value]
    entries = read_list(report, key, value, _TOOLS)
    tools: list[JsonObject] = []
    for index, entry in enumerate(entries or ()):
        at = f"{key}[{index}]"
        if isinstance(entry, str) and entry.lstrip().startswith("{"):
            report.converted.add("tools as text")
            entry = read_json(report, at, entry, _TOOLS)
            if entry is None:
                continue
        if not is_object(entry):
            report.add(at, f"a tool is an object, not {describe(entry)}", "write type and function")
            continue
        entry = {name: part for name, part in entry.items() if part is not None}
        found = [entry]
        for form in FORMS:
            if (read := form.tools(entry)) is not None:
                report.converted.add(form.tools_name or form.name)
                found = read or found
                break
        tools += [{**tool, "function": _function(report, at, tool)} for tool in found]
    try:
        json.dumps(tools, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # a table can hold dates and bytes, or nest without end
        report.add(key, "a tool can only hold what JSON can", "write dates and the like as text")
        return ()
    if not encodable(tools):
        report.add(key, "half of a surrogate pair (\\ud8xx) stands alone", "write the character itself")
    return tuple(tools)
