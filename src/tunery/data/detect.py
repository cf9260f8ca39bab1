"""What the rows of a file are: their kind, and which column holds what."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from tunery.config import DataConfig, KindName
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import Kind
from tunery.data.kinds.columns import BESIDE_A_PROMPT
from tunery.data.row_report import says_nothing
from tunery.data.source import known_here, printable
from tunery.errors import ConfigError
from tunery.jsonl import JsonObject


@dataclass(frozen=True, slots=True)
class Shape:
    """The kind of all rows, and role → column. The role "input" is the middle part of Alpaca's triple
    (instruction, input, output; Taori et al. 2023), which goes under the instruction in the prompt."""

    kind: KindName
    columns: dict[str, str]  # grows where a column that has a role first appears after the rows looked at
    notes: tuple[str, ...] = ()

    @property
    def rules(self) -> Kind:
        """How rows of this kind are read, rendered and so on."""
        return KINDS[self.kind]


def detect(values: Sequence[JsonObject | str], config: DataConfig) -> Shape:
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
    rows = [value for value in values if isinstance(value, dict)]
    kind = _find_kind(Names.of(rows), rows, plain, config) if config.kind == "auto" else KINDS[config.kind]
    _refuse_unused_settings(kind, config)
    if plain and not kind.plain_text:
        takes = next(other.name for other in KINDS.values() if other.plain_text)
        raise ConfigError(f"plain text files (.txt, .md) cannot be rows of kind {kind.name}", f"set data.kind: {takes}")
    columns = _find_columns(kind, Names.of(rows), config) if names else {}
    return Shape(kind.name, columns, _notes(kind, columns, config))


def check_columns(shape: Shape, values: Sequence[JsonObject | str], shown: str) -> None:
    """Raise ConfigError when a file lacks a column that `shape` needs."""
    names = column_names(values)
    if not names:
        if not shape.rules.plain_text and any(isinstance(value, str) for value in values):
            raise ConfigError(f"{shown}: plain text cannot be rows of kind {shape.kind}", "give a table or JSON lines")
        return
    there = {role for role, column in shape.columns.items() if column in names}
    for role in shape.rules.missing(there):
        column = shape.columns.get(role, role)
        raise ConfigError(f"{shown} has no column {column!r}, the {role} in the other files", known_here(column, names))


def column_names(values: Iterable[JsonObject | str]) -> list[str]:
    """All column names of some rows, in order of appearance."""
    return list(dict.fromkeys(key for value in values if isinstance(value, dict) for key in value))


@dataclass(frozen=True)
class Names:
    """The columns of some rows, in order of appearance.

    Attributes:
        all: their names.
        usual: those that some kind knows.
        speaking: those of them that hold something in at least one row.
    """

    all: list[str]
    usual: list[str]
    speaking: list[str]

    @classmethod
    def of(cls, rows: Sequence[JsonObject]) -> Names:
        names = column_names(rows)
        known = {name for kind in KINDS.values() for usual in (kind.required, kind.optional) for name in _every(usual)}
        usual = [name for name in names if name.strip().casefold() in known]
        silent = set(usual)
        for row in rows:
            if not silent:
                break
            silent.difference_update([key for key in silent & row.keys() if not says_nothing(row[key])])
        return cls(names, usual, [name for name in usual if name not in silent])


def _every(usual: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    return itertools.chain.from_iterable(usual.values())


_BESIDE = ("tools", *BESIDE_A_PROMPT)
"""Roles that a column fills only where it holds something."""


def usual_role(kind: Kind, name: str, config: DataConfig) -> str | None:
    """The role beside those that every row must have which a column of this name fills; None for any other column."""
    if name in config.ignore_columns:
        return None
    folded = name.strip().casefold()
    return next((role for role in kind.roles if role in _BESIDE and folded in kind.optional[role]), None)


def _set_columns(config: DataConfig) -> dict[str, str]:
    return {role: column for role, column in config.columns if column is not None}


def _candidates(kind: Kind, role: str, there: Names, config: DataConfig) -> list[str]:
    """The columns that could fill a role: the one that was set, else one with our name, else all with a usual name."""
    if column := _set_columns(config).get(role):
        return [column]
    taken = {*_set_columns(config).values(), *config.ignore_columns}
    names = [name for name in (there.speaking if role in _BESIDE else there.usual) if name not in taken]
    usual = {**kind.required, **kind.optional}[role]
    if usual[0] in names:
        return [usual[0]]
    folded = {name: name.strip().casefold() for name in names}
    found = [name for name in names if folded[name] == usual[0]] or [name for name in names if folded[name] in usual]
    if role == "prompt" and "instruction" in folded.values():
        found = [name for name in found if folded[name] != "input"]  # Alpaca's triple
    return found


def _found(kind: Kind, names: Names, config: DataConfig) -> dict[str, str]:
    """Role → the first column that could fill it, of those that have one."""
    candidates = {role: _candidates(kind, role, names, config) for role in kind.roles}
    return dict(kind.choose({role: columns[0] for role, columns in candidates.items() if columns}))


def _find_kind(names: Names, rows: Sequence[JsonObject], plain: bool, config: DataConfig) -> Kind:
    possible = _possible_kinds(config)
    if plain and len(possible) == len(KINDS):
        return next(kind for kind in possible if kind.plain_text)
    found = {kind.name: _found(kind, names, config) for kind in possible}
    missing = {kind.name: len(kind.missing(found[kind.name])) for kind in possible}
    fitting = _most_telling(
        {
            kind.name: set(found[kind.name])
            for kind in possible
            if not missing[kind.name] and kind.plausible(rows, found[kind.name])
        }
    )
    if len(possible) < len(KINDS):  # settings have a say
        return fitting[0] if fitting else min(possible, key=lambda kind: missing[kind.name])
    if len(fitting) > 1:
        raise ConfigError(
            f"the columns ({', '.join(map(printable, names.all[:30]))}) fit several kinds: "
            f"{', '.join(kind.name for kind in fitting)}",
            f"say which with data.kind: {' or '.join(kind.name for kind in fitting)}",
        )
    if fitting:
        return fitting[0]
    listed = ", ".join(map(printable, names.all[:30]))
    raise ConfigError(
        f"cannot tell what the columns hold: {listed}",
        "set data.kind and data.columns (for example data.columns.text: NAME), or name the columns "
        "messages; prompt, chosen and rejected; prompt and completion (and label, where answers are marked true or "
        "false); text and label; or text. "
        "The first line of a CSV must name its columns",
    )


def _most_telling(found: Mapping[KindName, set[str]]) -> list[Kind]:
    """The kinds that fit (and the roles that they find columns for), without those that another explains more than,
    without last resorts beside any other, and without others beside pairs: nothing else has two answers."""
    kinds = [KINDS[name] for name, roles in found.items() if not any(roles < others for others in found.values())]
    kinds = [kind for kind in kinds if not kind.last_resort] or kinds
    return [kind for kind in kinds if kind.pairs] or kinds


def _possible_kinds(config: DataConfig) -> list[Kind]:
    """The kinds that have a use for everything that was set; all of them where nothing tells them apart.

    Raises:
        ConfigError: no kind has.
    """
    roles = list(_set_columns(config))
    own = [name for name in ("labels", "instruction") if getattr(config, name) is not None]
    possible = [kind for kind in KINDS.values() if set(roles) <= set(kind.roles) and set(own) <= set(kind.settings)]
    if possible:
        return possible
    users = [[kind.name for kind in KINDS.values() if role in kind.roles] for role in roles]
    users += [[kind.name for kind in KINDS.values() if name in kind.settings] for name in own]
    meant = dict.fromkeys(names[0] for names in users)
    raise ConfigError(f"the data settings belong to several kinds: {', '.join(meant)}", "set data.kind")


def _refuse_unused_settings(kind: Kind, config: DataConfig) -> None:
    """A setting that would be ignored is an error."""
    foreign = [f"columns.{role}" for role in _set_columns(config) if role not in kind.roles]
    settings = dict.fromkeys(name for other in KINDS.values() for name in other.settings)
    foreign += [name for name in settings if getattr(config, name) is not None and name not in kind.settings]
    if foreign:
        kinds = ", ".join(get_args(KindName))
        raise ConfigError(
            f"data.{foreign[0]} has no meaning for kind {kind.name}",
            f"remove it, or set data.kind to another of {kinds}",
        )


def _find_columns(kind: Kind, names: Names, config: DataConfig) -> dict[str, str]:
    columns = _found(kind, names, config)
    for role in columns:
        found = _candidates(kind, role, names, config)
        if len(found) > 1:
            raise ConfigError(
                f"several columns could be the {role}: {', '.join(map(printable, found))}",
                f"set data.columns.{role}: {found[0]}, say",
            )
    if missing := kind.missing(columns):
        there = ", ".join(map(printable, names.all[:30]))
        raise ConfigError(
            f"kind {kind.name} needs a column for the {missing[0]}; there are: {there}",
            f"set data.columns.{missing[0]}: NAME",
        )
    for role, column in _set_columns(config).items():
        if role not in columns:
            raise ConfigError(f"data.columns.{role} ({printable(column)}) is not used beside the others", "remove it")
    if len(set(columns.values())) < len(columns):
        raise ConfigError(f"one column is set for two roles: {columns}", "set each of data.columns to its own column")
    if columns.get("prompt", "").casefold() == "instruction":
        taken = {*columns.values(), *config.ignore_columns}
        extra = [name for name in names.all if name.casefold() == "input" and name not in taken]
        if extra:
            columns["input"] = extra[0]
    return columns


def _notes(kind: Kind, columns: dict[str, str], config: DataConfig) -> tuple[str, ...]:
    notes: list[str] = []
    chosen = ", ".join(f"{role} from {column}" for role, column in columns.items())
    how = "found" if config.kind == "auto" else "as set"
    notes.append(f"Kind {kind.name} ({how})" + (f": {chosen}." if chosen else "."))
    under = [column for role, column in columns.items() if role in ("input", "context")]
    if under:
        notes.append(f"Where a row has {' and '.join(under)}, it follows the {columns['prompt']} in the prompt.")
    if "history" in columns:
        notes.append(f"The answers in {columns['history']} are trained as every answer of a conversation is.")
    return tuple(notes)
