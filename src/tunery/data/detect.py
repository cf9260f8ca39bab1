"""What the rows of a file are: their kind, and which column holds what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from tunery.config import DataConfig, Kind
from tunery.data.source import printable
from tunery.errors import ConfigError
from tunery.text import did_you_mean

REQUIRED: dict[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "preference": ("chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
"""The roles that a row of each kind must fill."""

_OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "chat": ("tools",),
    "preference": ("prompt", "tools"),
    "completion": (),
    "classification": (),
    "text": (),
}

_USUAL_NAMES = {
    "messages": ("messages", "conversations", "conversation"),
    "tools": ("tools",),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "chosen": ("chosen", "preferred", "preferred_output", "preferred_completion"),
    "rejected": ("rejected", "non_preferred", "non_preferred_output", "non_preferred_completion"),
    "completion": ("completion", "response", "output", "answer"),
    "text": ("text", "review", "sentence", "content"),
    "label": ("label", "sentiment", "category", "class", "target"),
}
"""Role → names it goes by. The first is ours and wins; two of the others at once are ambiguous."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The kind of all rows, and role → column. The role "input" is the middle part of Alpaca's triple
    (instruction, input, output; Taori et al. 2023), which goes under the instruction in the prompt."""

    kind: Kind
    columns: dict[str, str]
    notes: tuple[str, ...] = ()


def detect(values: Sequence[dict[str, Any] | str], config: DataConfig) -> Shape:
    """Find kind and columns, from the settings where they say so and else from the usual names.

    Args:
        values: the first rows of every training file.
        config: `kind`, `columns`, and the settings that only one kind uses.

    Raises:
        ConfigError: nothing fits, several things fit, a column that was set does not exist, or a setting has no meaning
            for the kind.
    """
    names = column_names(values)
    plain = any(isinstance(value, str) for value in values)
    if names:
        for role, column in _set_columns(config).items():
            if column not in names:
                raise ConfigError(f"data.columns.{role}: there is no column {column!r}", known_here(column, names))
    kind = _find_kind(names, plain, config) if config.kind == "auto" else config.kind
    _refuse_unused_settings(kind, config)
    if plain and kind != "text":
        raise ConfigError(f"plain text files (.txt, .md) cannot be rows of kind {kind}", "set data.kind: text")
    columns = _find_columns(kind, names, config) if names else {}
    return Shape(kind, columns, _notes(kind, columns, names, config))


def check_columns(shape: Shape, values: Sequence[dict[str, Any] | str], shown: str) -> None:
    """Raise ConfigError when a file lacks a column that `shape` needs."""
    names = column_names(values)
    if not names:
        if shape.kind != "text" and any(isinstance(value, str) for value in values):
            raise ConfigError(f"{shown}: plain text cannot be rows of kind {shape.kind}", "give a table or JSON lines")
        return
    for role in REQUIRED[shape.kind]:
        column = shape.columns.get(role, role)
        if column not in names:
            raise ConfigError(
                f"{shown} has no column {column!r}, the {role} in the other files",
                known_here(column, names),
            )


def column_names(values: Iterable[dict[str, Any] | str]) -> list[str]:
    """All column names of some rows, in order of appearance."""
    return list(dict.fromkeys(key for value in values if isinstance(value, dict) for key in value))


def known_here(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of the known names, and all of them (shortened)."""
    known = list(map(printable, known))
    more = f" and {len(known) - 30} more" if len(known) > 30 else ""
    meant = did_you_mean(printable(name), known)
    return (f"{meant} " if meant else "") + f"known here: {', '.join(known[:30])}{more}"


def _set_columns(config: DataConfig) -> dict[str, str]:
    return {role: column for role, column in config.columns if column is not None}


def _candidates(role: str, names: Sequence[str], config: DataConfig) -> list[str]:
    """The columns that could fill a role: the one that was set, else one with our name, else all with a usual name."""
    if column := _set_columns(config).get(role):
        return [column]
    taken = set(_set_columns(config).values())
    names = [name for name in names if name not in taken]
    usual = _USUAL_NAMES[role]
    if usual[0] in names:
        return [usual[0]]
    folded = {name: name.strip().casefold() for name in names}
    found = [name for name in names if folded[name] == usual[0]] or [name for name in names if folded[name] in usual]
    if role == "prompt" and "instruction" in folded.values():
        found = [name for name in found if folded[name] != "input"]  # Alpaca's triple
    return found


def _find_kind(names: list[str], plain: bool, config: DataConfig) -> Kind:
    if implied := _implied_kinds(names, config):
        if len(implied) > 1:
            raise ConfigError(f"the data settings belong to several kinds: {', '.join(implied)}", "set data.kind")
        return implied[0]
    if plain:
        return "text"
    kinds: tuple[Kind, ...] = ("chat", "preference", "completion", "classification")
    fitting: list[Kind] = [kind for kind in kinds if all(_candidates(role, names, config) for role in REQUIRED[kind])]
    if len(fitting) > 1:
        raise ConfigError(
            f"the columns ({', '.join(map(printable, names[:30]))}) fit several kinds: {', '.join(fitting)}",
            f"say which with data.kind: {fitting[0]}, for example",
        )
    if fitting:
        return fitting[0]
    if _candidates("text", names, config):
        return "text"
    listed = ", ".join(map(printable, names[:30]))
    raise ConfigError(
        f"cannot tell what the columns hold: {listed}",
        "set data.kind and data.columns (for example data.columns.text: NAME), or name the columns "
        "messages; prompt, chosen and rejected; prompt and completion; text and label; or text. "
        "The first line of a CSV must name its columns",
    )


def _implied_kinds(names: Sequence[str], config: DataConfig) -> list[Kind]:
    """The kinds that alone have a use for something that was set."""
    pairs = all(_candidates(role, names, config) for role in REQUIRED["preference"])
    roles = set(_set_columns(config))
    labelled = "label" in roles or config.labels is not None or config.instruction is not None
    tests: dict[Kind, bool] = {
        "chat": "messages" in roles or ("tools" in roles and not pairs),
        "preference": bool(roles & {"chosen", "rejected"}) or (pairs and bool(roles & {"prompt", "tools"})),
        "completion": "completion" in roles or ("prompt" in roles and not pairs),
        "classification": labelled,
    }
    return [kind for kind, is_meant in tests.items() if is_meant]


def _refuse_unused_settings(kind: Kind, config: DataConfig) -> None:
    """A setting that would be ignored is an error."""
    foreign = [f"columns.{role}" for role in _set_columns(config) if role not in (*REQUIRED[kind], *_OPTIONAL[kind])]
    if kind != "classification":
        foreign += [name for name in ("labels", "instruction") if getattr(config, name) is not None]
    if kind in ("completion", "text") and config.system is not None:
        foreign.append("system")
    if foreign:
        kinds = ", ".join(get_args(Kind))
        raise ConfigError(
            f"data.{foreign[0]} has no meaning for kind {kind}", f"remove it, or set data.kind to another of {kinds}"
        )


def _find_columns(kind: Kind, names: list[str], config: DataConfig) -> dict[str, str]:
    columns = {}
    for role in (*REQUIRED[kind], *_OPTIONAL[kind]):
        found = _candidates(role, names, config)
        if len(found) > 1:
            raise ConfigError(
                f"several columns could be the {role}: {', '.join(map(printable, found))}",
                f"set data.columns.{role}: {found[0]}, say",
            )
        if found:
            columns[role] = found[0]
        elif role in REQUIRED[kind]:
            raise ConfigError(
                f"kind {kind} needs a column for the {role}; there are: {', '.join(map(printable, names[:30]))}",
                f"set data.columns.{role}: NAME",
            )
    if len(set(columns.values())) < len(columns):
        raise ConfigError(f"one column is set for two roles: {columns}", "set each of data.columns to its own column")
    if columns.get("prompt", "").casefold() == "instruction":
        extra = [name for name in names if name.casefold() == "input" and name not in columns.values()]
        if extra:
            columns["input"] = extra[0]
    return columns


def _notes(kind: Kind, columns: dict[str, str], names: list[str], config: DataConfig) -> tuple[str, ...]:
    notes = []
    chosen = ", ".join(f"{role} from {column}" for role, column in columns.items())
    how = "found" if config.kind == "auto" else "as set"
    notes.append(f"Kind {kind} ({how})" + (f": {chosen}." if chosen else "."))
    if "input" in columns:
        notes.append("Where a row has an input, it follows the instruction in the prompt.")
    unused = [name for name in names if name not in columns.values()]
    if unused:
        more = f" and {len(unused) - 20} more" if len(unused) > 20 else ""
        notes.append(f"Columns not used: {', '.join(unused[:20])}{more}.")
    return tuple(notes)
