"""What each setting means, from its description in tunery.config: `tunery settings`, docs/reference.md, and errors."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunery.config import Task, all_settings, sections
from tunery.errors import ConfigError
from tunery.jsonl import JsonObject
from tunery.text import similar_names

_NAMES = {str: "text", int: "whole number", float: "number", bool: "true, false", type(None): "null"}
_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What may be written for a setting, in words: "whole number > 0, auto"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        nested = [part for item in arguments[1:] for part in (getattr(item, "metadata", None) or [item])]
        return describe_type(arguments[0], [*nested, *metadata])
    if origin in (Union, types.UnionType):
        return ", ".join(dict.fromkeys(describe_type(argument) for argument in arguments))
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {describe_type(arguments[0])}"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "map"
    if origin is list:
        return "list" if arguments[0] is Any else f"list of {describe_type(arguments[0])}"
    limits = [
        f" {sign} {value:g}"
        for part in metadata
        for key, sign in _SIGNS.items()
        if _is_shown(value := _limit(part, key))
    ]
    return _NAMES.get(annotation, str(annotation)) + " and".join(limits)


def _limit(part: Any, key: str) -> float | None:
    return getattr(part, key, None)


def _is_shown(value: float | None) -> bool:
    return value is not None and value < 1e9


def describe_default(info: FieldInfo) -> str:
    """The default as YAML would write it; "needed" where there is none, "left out" where leaving it out means more."""
    if info.is_required():
        return "needed"
    value = info.get_default(call_default_factory=True)
    words = {None: "left out", True: "true", False: "false"}
    if isinstance(value, bool) or value is None:
        return words[value]
    return "[]" if value == () else str(value)


# --------------------------------------------------------------------------- by name


@dataclass(frozen=True, slots=True)
class SettingHelp:
    """A setting in words.

    Attributes:
        name: with its section, as "lora.rank".
        section: the section that it belongs to; "" at the top of the file.
        values, default, description: what may be written, what holds without it, what it does.
    """

    name: str
    section: str
    values: str
    default: str
    description: str

    def as_json(self) -> JsonObject:
        """For programs."""
        return asdict(self)

    def example(self) -> str:
        """The setting as it stands in a task file."""
        value: object = self.default if self.default not in ("needed", "left out") else "VALUE"
        for part in reversed(self.name.split(".")):
            value = {part: value}
        text = yaml.safe_dump(value, sort_keys=False, default_flow_style=False)
        return text.replace("'", "").rstrip()


def _help(name: str, info: FieldInfo) -> SettingHelp:
    values = describe_type(info.annotation, info.metadata)
    return SettingHelp(name, name.rpartition(".")[0], values, describe_default(info), info.description or "")


def setting_help(name: str | None = None) -> list[SettingHelp]:
    """The settings that a name stands for, in the order of the file.

    Args:
        name: a setting ("lora.rank", or "rank" alone), a section ("lora"), or None for all.

    Raises:
        ConfigError: there is none of that name; similar ones are suggested.
    """
    known = dict(all_settings())
    if name is None:
        wanted = list(known)
    elif name in known:
        wanted = [name]
    else:
        in_section = [each for each in known if each.startswith(f"{name}.")]
        wanted = in_section or [each for each in known if each.rpartition(".")[2] == name]
    if not wanted:
        meant = _similar(tuple(str(name).split(".")))
        raise ConfigError(f"there is no setting {name!r}", meant or "`tunery settings` lists them all")
    return [_help(each, known[each]) for each in wanted]


def section_help(section: str) -> str:
    """What a section is about, in a sentence."""
    model = dict(sections(Task))[tuple(section.split(".")) if section else ()]
    return " ".join((model.__doc__ or "").split())


def meant_setting(field: tuple[str, ...]) -> str:
    """What to say of a setting that does not exist: the similar one, or those that are known there."""
    if meant := _similar(field):
        return meant
    section = dict(sections(Task)).get(field[:-1])
    known = section.model_fields if section else (name for name, _ in all_settings())
    return f"known here: {', '.join(known)}"


def _similar(field: tuple[str, ...]) -> str | None:
    """ "did you mean X?", X being a setting or a section."""
    settings = [name for name, _ in all_settings()]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in settings}
    close = similar_names(".".join(field), settings, 1, 0.75)
    close = close or [by_leaf[leaf] for leaf in similar_names(field[-1], by_leaf)]
    close = close or similar_names(".".join(field), [".".join(path) for path, _ in sections(Task) if path], 1, 0.75)
    return f"did you mean {close[0]}?" if close else None


def where_described(fields: Sequence[tuple[str, ...]]) -> str:
    """The hint of an error about settings: the command that describes them."""
    known = {name for name, _ in all_settings()} | {".".join(path) for path, _ in sections(Task) if path}
    named = dict.fromkeys(".".join(field) for field in fields if ".".join(field) in known)
    found = dict.fromkeys(
        ".".join(field[:-1]) for field in fields if dict(sections(Task)).get(field[:-1]) and field[1:]
    )
    if len(named) == 1 == len(set(fields)):
        return f"`tunery settings {next(iter(named))}` describes it"
    if len(found) == 1:
        return f"`tunery settings {next(iter(found))}` describes them"
    return "`tunery settings` lists every setting"
