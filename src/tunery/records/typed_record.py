"""The base of all records: pydantic models that also read as the JSON they are written as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tunery.jsonl import JsonObject
from tunery.paths import read_json, write_json


class RecordError(ValueError):
    """A file that does not hold the record it should; the message names the field."""


class Record(BaseModel):
    """A record, or a section of one.

    Fields are attributes (`receipt.training.steps`), and keys as in the file (`receipt["training"]["steps"]`). A field
    that this version does not know is kept as it is, so that a file of a later version is written back whole.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=(), ser_json_inf_nan="null")

    @classmethod
    def of(cls, values: object, where: str = "") -> Self:
        """From JSON values.

        Raises:
            RecordError: they are something else.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"]))
            raise RecordError(f"{where}{at}: {first['msg']}") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file.

        Raises:
            FileNotFoundError: it is not there.
            RecordError: it holds something else.
        """
        try:
            values = read_json(path)
        except ValueError as error:
            raise RecordError(str(error)) from None
        return cls.of(values)

    def as_json(self) -> JsonObject:
        """JSON values, without fields that were never set."""
        return self.model_dump(mode="json", exclude_unset=True)

    def write(self, path: Path) -> None:
        """To a file, whole or not at all."""
        write_json(path, self.as_json())

    def _repr_html_(self) -> str:
        """In a notebook: field by field, sections and lists folded."""
        return _table(self.as_json())

    # ----------------------------------------------------------------- as the JSON it is

    def __getitem__(self, key: str) -> Any:
        if key in self.model_fields_set:
            return getattr(self, key)
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return key in self.model_fields_set

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(self.keys())

    def __eq__(self, other: object) -> bool:
        mine = self.as_json()
        return mine == (other.as_json() if isinstance(other, Record) else other)

    __hash__ = None  # type: ignore[assignment]

    def get(self, key: str, default: object = None) -> Any:
        """The field, or the default where it was not set."""
        return getattr(self, key) if key in self.model_fields_set else default

    def keys(self) -> list[str]:
        """The fields that were set, in the order of the file."""
        known = [*type(self).model_fields, *(self.model_extra or {})]
        return [key for key in known if key in self.model_fields_set]

    def items(self) -> list[tuple[str, Any]]:
        """The fields that were set, with their values."""
        return [(key, self[key]) for key in self.keys()]

    def values(self) -> list[Any]:
        """Their values."""
        return [self[key] for key in self.keys()]


_LONGEST_LIST = 100
"""Entries of a list that a notebook shows."""


def _table(value: Mapping[str, object]) -> str:
    rows = (f"<tr><th>{escape(str(key))}</th><td>{_cell(inner)}</td></tr>" for key, inner in value.items())
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, Mapping) and value:
        return f"<details><summary>{len(value)} entries</summary>{_table(value)}</details>"
    if isinstance(value, list) and len(value) > 1:
        shown = {str(number): inner for number, inner in enumerate(value[:_LONGEST_LIST])}
        return f"<details><summary>{len(value)} entries</summary>{_table(shown)}</details>"
    return escape(f"{value:.6g}" if isinstance(value, float) else str(value))


Mapping.register(Record)  # type: ignore[attr-defined]
