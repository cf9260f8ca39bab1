"""What all requests share: strict types, null for "left out", and errors that name the field as OpenAI's do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from tunery.jsonl import JsonMapping
from tunery.serve.api_errors import ApiError, shorten
from tunery.text import similar_names

T = TypeVar("T", bound="Request")


class Request(BaseModel):
    """Base of all request bodies.

    A key that is null counts as left out. A key that is not known is an error, so that nothing is silently ignored.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=False)

    unsupported: ClassVar[Mapping[str, str]] = {}
    """Keys that OpenAI's API has, that would change the answer, and that this server has no means for → the reason."""

    ignored: ClassVar[frozenset[str]] = frozenset()
    """Keys that OpenAI's API has and that make no difference to an answer here."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None and key not in cls.ignored}
        for key, reason in cls.unsupported.items():
            if key in data:
                raise problem(f"Unsupported parameter: '{key}'. {reason}", code="unsupported_parameter", at=key)
        return data

    @classmethod
    def known(cls) -> list[str]:
        """Every key that a client may send, for a did-you-mean."""
        names = [info.alias or name for name, info in cls.model_fields.items()]
        return [*names, *cls.ignored]


def problem(message: str, *, code: str = "invalid_value", at: str = "") -> PydanticCustomError:
    """An error to raise in a validator.

    Args:
        at: where in the field the problem is, to be added to the field's own path: "[0].content".
    """
    return PydanticCustomError("problem", "{message}", {"message": message, "code": code, "at": at})


def parse(model: type[T], body: bytes) -> T:
    """A request from its JSON.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise explain(error, model) from None


def explain(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first of pydantic's complaints in OpenAI's words, with its codes."""
    return explain_first(error.errors(include_url=False)[0], model)


def explain_first(item: JsonMapping, model: type[BaseModel] | None = None) -> ApiError:
    """A complaint of pydantic in OpenAI's words; `model` knows which keys there are."""
    kind, context, given = item["type"], item.get("ctx") or {}, item.get("input")
    param = _path(item["loc"])
    if kind == "json_invalid":
        return ApiError(400, f"We could not parse the JSON body of your request: {context.get('error', 'invalid')}.")
    if kind == "problem":
        at = str(context["at"])
        param = f"{param}.{at}" if param and at and not at.startswith("[") else f"{param}{at}"
        return ApiError(400, str(context["message"]), code=str(context["code"]), param=param or None)
    if kind == "extra_forbidden":
        hint = meant(str(item["loc"][-1]), known_keys(model, item["loc"][:-1]) if model else ())
        return ApiError(400, f"Unknown parameter: '{shorten(param)}'.{hint}", code="unknown_parameter", param=param)
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    where = f" '{shorten(param)}'" if param else " the body of the request"
    message, code = _words(where, kind, context, given, str(item["msg"]))
    return ApiError(400, message, code=code, param=param or None)


def meant(name: str, known: Iterable[str]) -> str:
    """A hint in OpenAI's style, with a space in front; nothing if no known name is close."""
    close = similar_names(name, known)
    return f" Did you mean '{close[0]}'?" if close else ""


def known_keys(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys that are known at a place in a request."""
    for part in loc:
        fields = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
        if part in fields and (inner := _model_in(fields[str(part)])):
            model = inner
    return model.known() if issubclass(model, Request) else list(model.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(part) for part in getattr(annotation, "__args__", ()))
    return next((model for model in found if model), None)


def _path(loc: Sequence[int | str]) -> str:
    """("messages", 0, "content") → messages[0].content"""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {
    "greater_than_equal": (">=", "ge", "below_min_value", "below minimum value"),
    "greater_than": (">", "gt", "below_min_value", "below minimum value"),
    "less_than_equal": ("<=", "le", "above_max_value", "above maximum value"),
    "less_than": ("<", "lt", "above_max_value", "above maximum value"),
}
_LENGTHS = {
    "string_too_short": ("string_below_min_length", "min_length", "string too short: at least {} characters"),
    "string_too_long": ("string_above_max_length", "max_length", "string too long: at most {} characters"),
    "too_short": ("array_below_min_length", "min_length", "array too short: at least {} entries"),
    "too_long": ("array_above_max_length", "max_length", "too many entries: at most {}"),
}


def _words(where: str, kind: str, context: JsonMapping, given: object, message: str) -> tuple[str, str]:
    """(what to say, the code); `where` is what it is about, after a space."""
    if kind in _TYPES:
        return f"Invalid type for{where}: expected {_TYPES[kind]}, but got {kind_of(given)} instead.", "invalid_type"
    if kind in _BOUNDS:
        sign, key, code, words = _BOUNDS[kind]
        number = "integer" if isinstance(context[key], int) else "decimal"
        expected = f"Expected a value {sign} {shown(context[key])}, but got {shown(given)} instead."
        return f"Invalid{where}: {number} {words}. {expected}", f"{number}_{code}"
    if kind in _LENGTHS:
        code, key, words = _LENGTHS[kind]
        return f"Invalid{where}: {words.format(context[key])}.", code
    if kind == "literal_error":
        return (
            f"Invalid value for{where}: {shown(given)}. Supported values are: {context['expected']}.",
            "invalid_value",
        )
    if kind == "finite_number":
        return f"Invalid value for{where}: a finite number is needed.", "invalid_value"
    if kind == "string_pattern_mismatch":
        return f"Invalid{where}: it must match {context['pattern']}.", "invalid_value"
    return f"Invalid value for{where}: {message}", "invalid_value"


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    try:
        return shorten(json.dumps(value, ensure_ascii=False))
    except (ValueError, TypeError, RecursionError):  # a number of thousands of digits, say
        return kind_of(value)


def kind_of(value: object) -> str:
    """What a value is, in JSON's terms."""
    if value is None:
        return "null"
    names: tuple[tuple[type, str], ...] = (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a decimal"),
        (str, "a string"),
        (list, "an array"),
        (dict, "an object"),
    )
    return next((name for type_, name in names if isinstance(value, type_)), type(value).__name__)
