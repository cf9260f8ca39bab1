"""Columns that no role takes: harmless ones are named, those that matter are refused, those set aside are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from tunery.config import DataConfig
from tunery.data.detect import Shape, usual_role
from tunery.data.example import Example, Place
from tunery.data.kinds import KINDS
from tunery.data.kinds.columns import Meaning
from tunery.data.row_report import says_nothing
from tunery.data.source import known_here, printable
from tunery.errors import ConfigError
from tunery.jsonl import JsonMapping, is_mapping
from tunery.text import some_of

_NAMED = 20
_MARKS_OF_MESSAGES = ("role", "from", "type", "id", "tool_call_id", "name")
_NAMES_OF_PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval", "evaluation", "test"),
    "test": ("test", "testing", "eval", "evaluation", "validation", "val", "valid", "dev"),
}
"""What a column may say of the rows of a file that is read for a part."""


@dataclass
class UnusedColumns:
    """Watches the columns of all rows of a task.

    Args:
        shape: what the rows are. A column that fills one of its roles and first appears late is added to it.
        config: `ignore_columns`, and the columns that were set.
        settled: the columns are those of a run that is finished: what it left aside is left aside again.

    Attributes:
        plain: columns of which nothing is known, in order of appearance.
        ignored: column set aside → rows in which it held something.
        late: column found for a role after detection → where it first appears.
        refused: column that matters → where it first holds something, and what it usually is.
    """

    shape: Shape
    config: DataConfig
    settled: bool = False
    plain: dict[str, None] = field(default_factory=dict[str, None])
    ignored: Counter[str] = field(default_factory=Counter[str])
    late: dict[str, Place] = field(default_factory=dict[str, Place])
    refused: dict[str, tuple[Place, Meaning]] = field(default_factory=dict[str, tuple[Place, Meaning]])
    _known: set[str] = field(default_factory=set[str])
    _other: set[str] = field(default_factory=set[str])
    _roles: set[str] = field(default_factory=set[str])
    _watched: dict[str, Meaning] = field(default_factory=dict[str, Meaning])

    def __post_init__(self) -> None:
        self._known = set(self.shape.columns.values())
        if not self.settled:
            self._other = set(self._other_candidates())
            self._roles = {name for usual in self.shape.rules.optional.values() for name in usual}

    def _other_candidates(self) -> Iterator[str]:
        """Names of columns that could have filled a role for which another one was set."""
        kind = self.shape.rules
        for role, column in self.config.columns:
            if column is not None:
                yield from {**kind.required, **kind.optional}.get(role, ())

    def meet(self, row: JsonMapping, file: str, line: int) -> None:
        """Look at a row's columns, before the row is read."""
        if new := row.keys() - self._known:
            place = Place(file, line)
            for name in [name for name in row if name in new]:
                self._meet(name, row, place)

    def _meet(self, name: str, row: JsonMapping, place: Place) -> None:
        folded = name.strip().casefold()
        if name in self.config.ignore_columns or folded in self._other:
            self.ignored[name] += not says_nothing(row[name])  # it stays unknown, and is met in every row
            return
        if self.settled:
            self._known.add(name)
            self.plain[name] = None
            return
        role = usual_role(self.shape.rules, name, self.config) if folded in self._roles else None
        if role and role not in self.shape.columns and role in self._roles_with(role, name):
            if says_nothing(row[name]):
                return
            self.shape.columns[role] = name
            self.late[name] = place
            self._known.add(name)
            return
        self._known.add(name)
        meaning = next((meaning for meaning in self.shape.rules.meanings if folded in meaning.names), None)
        if meaning is None:
            self.plain[name] = None
        else:
            self._watched[name] = meaning

    def _roles_with(self, role: str, name: str) -> set[str]:
        return set(self.shape.rules.choose({**self.shape.columns, role: name}))

    def compare(self, row: JsonMapping, example: Example, part: str) -> None:
        """Look at what columns of meaning hold that no role takes, once the row is read.

        Args:
            part: the rows are read for train, validation or test.
        """
        for name, meaning in self._watched.items():
            value = row.get(name)
            if says_nothing(value) or name in self.refused:
                continue
            said = str(value).strip().casefold()
            if (
                said in meaning.plain
                or (meaning.names_part and said in _NAMES_OF_PARTS.get(part, (part,)))
                or (meaning.said_elsewhere and self._is_said(value, row, example))
            ):
                continue
            self.refused[name] = (example.where, meaning)

    def _is_said(self, value: object, row: JsonMapping, example: Example) -> bool:
        """Whether a row says elsewhere what a value says: the value is part of it, or holds all of it. What it says is
        taken as it was read, and as it stands in the columns (others make one prompt of several in another way)."""
        used = [row.get(column) for column in self.shape.columns.values()]
        said = [text.strip() for text in _leaves(value) if text.strip()]
        together = "\n".join(said)
        read, stands = ([t.strip() for t in _leaves(part) if t.strip()] for part in ([*_content(example)], used))
        return all(any(part in text for text in read) for part in said) or any(
            all(text in together for text in texts) for texts in (read, stands) if texts
        )

    def check(self) -> None:
        """Raise ConfigError for columns that matter and are not used, and for misspelt ones to ignore."""
        if self.refused:
            names = list(self.refused)
            listed = "; ".join(
                f"{printable(name)} ({meaning.what}; {place})" for name, (place, meaning) in self.refused.items()
            )
            raise ConfigError(
                f"kind {self.shape.kind} has no use for {listed}",
                f"put what it says into the columns that are used, set {self._other_kind(names)}, or leave it aside "
                f"with data.ignore_columns: [{', '.join(map(printable, names))}]",
            )
        seen = {*self._known, *self.ignored}
        for name in self.config.ignore_columns:
            if name not in seen:
                raise ConfigError(f"data.ignore_columns: there is no column {name!r}", known_here(name, sorted(seen)))

    def _other_kind(self, names: list[str]) -> str:
        """The settings with which some columns may be used: a kind that has roles for them and those in use, if any."""
        used = {role: column for role, column in self.shape.columns.items() if role != "input"}
        for kind in KINDS.values():
            roles = {role: name for name in names if (role := usual_role(kind, name, self.config))}
            found = {**used, **roles}
            if len(roles) == len(names) and {*found} <= {*kind.roles} and not kind.missing(found):
                return f"data.kind: {kind.name}, which uses it"
        return "data.kind or data.columns"

    def notes(self) -> list[str]:
        """What to tell of the columns that are not used, a sentence each."""
        found = [f"{name} first appears at {place}, and is used." for name, place in self.late.items()]
        if self.plain:
            found.append(f"Columns not used: {some_of(list(self.plain), _NAMED)}.")
        if self.ignored:
            counts = ", ".join(f"{name} ({count:,})" for name, count in self.ignored.items())
            found.append(f"Columns set aside, with the rows in which they hold something: {counts}.")
        return found


def _content(example: Example) -> Iterator[object]:
    yield from (example.text, example.label, example.prompt, example.completion)
    yield from (example.messages, example.chosen, example.rejected)


def _leaves(value: object) -> Iterator[str]:
    """All texts in a value, but for those that only mark messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Sequence):
        for part in cast("Sequence[object]", value):
            yield from _leaves(part)
    elif is_mapping(value):
        for key, part in value.items():
            if key not in _MARKS_OF_MESSAGES:
                yield from _leaves(part)
    elif value is not None and not isinstance(value, bool):
        yield str(value)
