"""POST /v1/chat/completions: a conversation to answer.

Messages and tools are read by the reader of training data (tunery.data.conversation), so that a conversation means the
same when a model learns from it and when it answers it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunery.data.conversation import Given, converted, read_message
from tunery.data.row_report import Report
from tunery.data.tool_calls import CallLedger, read_tools
from tunery.jsonl import JsonObject, is_object
from tunery.serve.schemas.base import Request, kind_of, problem
from tunery.serve.schemas.sampling import SamplingRequest

MAX_TOOLS = 128
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"

_OF_ANSWERS = ("annotations", "parsed", "weight")
"""Keys of messages that come back from an answer, or out of a training file, and mean nothing in a question."""


def _raise_first(report: Report) -> None:
    """Turn the first problem that the reader found into an error with its path."""
    if report.problems:
        first = report.problems[0]
        field = re.sub(r"^(messages|tools)", "", first.field)
        code = "missing_required_parameter" if first.message == "missing" else "invalid_value"
        raise problem(f"Invalid '{first.field}': {first.message}; {first.fix}.", code=code, at=field)


def _list(value: object, name: str, limit: int | None = None) -> list[object]:
    if not isinstance(value, list):
        raise problem(
            f"Invalid type for '{name}': expected an array of objects, but got {kind_of(value)} instead.",
            code="invalid_type",
        )
    if not value:
        raise problem(f"Invalid '{name}': the array is empty.", code="empty_array")
    if limit and len(value) > limit:
        raise problem(f"Invalid '{name}': too many entries: at most {limit}.", code="array_above_max_length")
    return value


def _messages(value: object) -> list[JsonObject]:
    report, ledger = Report("", 0), CallLedger()
    given = [Given(_asked(message), f"messages[{index}]") for index, message in enumerate(_list(value, "messages"))]
    messages: list[JsonObject] = []
    for one in converted(report, given):
        message = read_message(report, one, ledger, trained=False)
        _raise_first(report)
        message.pop("weight", None)
        if "tool_calls" in message:
            message["tool_calls"] = [_bare_call(call) for call in message["tool_calls"]]
        messages.append(message)
    return messages


def _asked(message: object) -> object:
    """A message without what only answers have."""
    return {key: part for key, part in message.items() if key not in _OF_ANSWERS} if is_object(message) else message


def _bare_call(call: JsonObject) -> JsonObject:
    """A tool call without what the client's own parsing adds to it."""
    function = {key: call["function"][key] for key in ("name", "arguments")}
    return {"id": call["id"], "type": "function", "function": function}


def _tools(value: object) -> list[JsonObject]:
    report = Report("", 0)
    tools = list(read_tools(report, "tools", _list(value, "tools", MAX_TOOLS)))
    _raise_first(report)
    names: set[str] = set()
    for index, tool in enumerate(tools):
        function, at = tool["function"], f"[{index}].function"
        name, parameters = function["name"], function.get("parameters")
        if not re.fullmatch(_NAME, name):
            raise problem(f"Invalid 'tools{at}.name': it must match {_NAME}.", at=f"{at}.name")
        if name in names:
            raise problem(f"Invalid 'tools{at}.name': two tools are called {name}.", at=f"{at}.name")
        if parameters is not None and not isinstance(parameters, dict):
            raise problem(f"Invalid 'tools{at}.parameters': a JSON schema is an object.", at=f"{at}.parameters")
        names.add(name)
    return tools


def _tool_choice(value: object) -> tuple[str, str | None]:
    if value in ("none", "auto", "required"):
        return value, None
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        name = value["function"].get("name")
        if isinstance(name, str):
            return "required", name
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        raise problem("Unsupported value: 'tool_choice' of type allowed_tools. List in 'tools' only those you allow.")
    raise problem(
        "Invalid 'tool_choice': it is 'none', 'auto', 'required', or "
        '{"type": "function", "function": {"name": "…"}}.'
    )


def _modalities(value: object) -> list[str]:
    if value != ["text"]:
        raise problem("Unsupported value: 'modalities' can only be [\"text\"] here: models take and give text.")
    return ["text"]


class JsonSchema(Request):
    """`response_format.json_schema`. `schema_` None allows any JSON object."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool = False


class ResponseFormat(Request):
    """`response_format`: free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise problem(
                "Missing required parameter: 'response_format.json_schema'.",
                code="missing_required_parameter",
                at="json_schema",
            )
        if self.type != "json_schema" and self.json_schema is not None:
            raise problem("'response_format.json_schema' needs type json_schema.", at="json_schema")
        return self


_TEXT_ONLY = "Models here take and give text."


class ChatRequest(SamplingRequest):
    """The body, with every field settled.

    Attributes:
        messages: in the form of training data: role, content (a text), and where given name, tool_calls, tool_call_id,
            reasoning_content.
        tools: in OpenAI's form, each {type: function, function: {name, description, parameters, strict}}.
        tool_mode: (none | auto | required, the one function that may be called or None for any).
        max_completion_tokens: longest answer in tokens; `max_tokens` is its older name. None: as the context allows.
        top_logprobs: alternatives shown at each token; 0 shows the chosen token alone.
    """

    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "reasoning_effort",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
            "verbosity",
        }
    )
    unsupported: ClassVar[Mapping[str, str]] = {
        "audio": _TEXT_ONLY,
        "function_call": "It was replaced by 'tool_choice'.",
        "functions": "They were replaced by 'tools'.",
        "moderation": "This server moderates nothing.",
        "prediction": "Leave it out: the answer is the same without it.",
        "web_search_options": "This server searches nothing.",
    }

    messages: Annotated[list[JsonObject], BeforeValidator(_messages)]
    tools: Annotated[list[JsonObject], BeforeValidator(_tools)] = Field(default_factory=list)
    tool_choice: Annotated[tuple[str, str | None] | None, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool = True
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(default=None, exclude=True)
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: ResponseFormat = Field(default_factory=ResponseFormat)
    modalities: Annotated[list[str], BeforeValidator(_modalities)] = Field(default_factory=lambda: ["text"])

    @model_validator(mode="before")
    @classmethod
    def _one_limit(cls, data: object) -> object:
        """Fold `max_tokens` into its newer name."""
        if isinstance(data, dict) and data.get("max_tokens") is not None:
            if data.get("max_completion_tokens") is not None:
                raise problem(
                    "'max_tokens' and 'max_completion_tokens' mean the same: give one of them.", at="max_tokens"
                )
            if type(data["max_tokens"]) is int and data["max_tokens"] > 0:  # else its own check speaks
                data = {**data, "max_completion_tokens": data["max_tokens"]}
        return data

    @model_validator(mode="after")
    def _combinations(self) -> ChatRequest:
        self.require_stream_for_options()
        mode, called = self.tool_mode
        if not self.tools and mode != "none":
            raise problem("'tool_choice' is only allowed when 'tools' are specified.", at="tool_choice")
        if called is not None and called not in {tool["function"]["name"] for tool in self.tools}:
            raise problem("Invalid 'tool_choice': it names a function that is not among 'tools'.", at="tool_choice")
        if self.top_logprobs and not self.logprobs:
            raise problem("'top_logprobs' needs 'logprobs' to be true.", at="top_logprobs")
        return self

    @property
    def tool_mode(self) -> tuple[str, str | None]:
        """As described above; ("none", None) without tools."""
        if self.tool_choice is None:
            return ("auto" if self.tools else "none"), None
        return self.tool_choice
