"""What a row of data becomes, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from tunery.config import KindName
from tunery.jsonl import JsonMapping

Message = JsonMapping
"""A message in OpenAI's form: role, content (a text), and on some name, weight (0 or 1), tool_calls, tool_call_id,
reasoning_content. A conversation that somebody asks a model is of the same form, before anything has read it."""

Tool = JsonMapping
"""A tool in OpenAI's form: {type: function, function: {name, description, parameters, …}}; parameters are a JSON
schema."""


ROW = "(row)"
"""The field of a problem that concerns a whole row."""

Fault = tuple[str, str, str]
"""(field, what is wrong, what to do): a problem before its file and line are known."""


class Place(str):
    """Where a row stands: the text "file:line" for people, and its two parts for programs."""

    __slots__ = ("file", "line")

    file: str
    line: int

    def __new__(cls, file: str, line: int) -> Place:
        place = super().__new__(cls, f"{file}:{line}")
        place.file, place.line = file, line
        return place

    def __reduce__(self) -> tuple[type[Place], tuple[str, int]]:
        return Place, (self.file, self.line)


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `kind` says which of the other fields hold content.

    chat: `messages` (OpenAI's form: role, content, and on assistant messages `weight` 0 or 1 and `tool_calls`) and
    `tools`; completion: `prompt`, `completion`; text: `text`; classification: `text` and `label`; preference:
    `messages` and `tools` before two answers, `chosen` (the better one) and `rejected`, each a list of messages that
    begins and ends with one of the assistant. tunery.data.kinds reads and renders them.
    `where` is for messages to the user.
    """

    kind: KindName
    where: Place
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    label: str = ""
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()


class ExampleFields(TypedDict, total=False):
    """What a row says: the fields of an Example besides its kind and its place."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    prompt: str
    completion: str
    text: str
    label: str
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as the model sees it.

    Attributes:
        text: without the tokens a tokenizer puts in front of plain text (`begin` asks for those).
        spans: trained stretches of `text`, as (start, end) in characters, ascending.
        begin: put the tokenizer's own first token (BOS) in front; a chat template writes its own.
        end: add the end-of-sequence token, trained.
        desirable: whether the answer is one to give or one to avoid; None where rows say nothing of it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    begin: bool = False
    end: bool = False
    desirable: bool | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one row: where it is, what is wrong, and how to fix it."""

    file: str
    line: int
    field: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.field}: {self.message} → {self.fix}"


class ReadFacts(TypedDict):
    """What reading found out: fields of a DataSet."""

    skipped: list[Problem]
    rows_read: int
    files: dict[str, str]
    converted: dict[str, int]
    columns_ignored: dict[str, int]
    columns_unused: list[str]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class DataSet:
    """All rows of a task, read and split.

    Attributes:
        kind: of every row (one data set holds one kind).
        columns: role → column or key it was read from, e.g. {"text": "review", "label": "stars"}.
        labels: label names in the order of the label map, else sorted; empty unless classification.
        train, validation, test: rows; no text stands in two of them.
        skipped: problems of the rows dropped under `data.on_bad_row: skip`.
        rows_read: rows found in all files, bad ones included.
        duplicates: rows of `train` whose content repeats an earlier one (kept, or dropped when so set).
        overlap_removed: rows dropped from `train` because the same text is in validation or test.
        files: path → SHA-256 of each file read (a hub data set: its name → fingerprint).
        converted: form other than OpenAI's → rows that were written in it.
        columns_ignored: column set aside by the task → rows in which it held something.
        columns_unused: columns of which nothing is known.
        notes: what was decided for the user (kind detected, columns chosen), one sentence each, for printing.
    """

    kind: KindName
    columns: dict[str, str]
    labels: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    skipped: list[Problem] = field(default_factory=list[Problem])
    rows_read: int = 0
    duplicates: int = 0
    overlap_removed: int = 0
    files: dict[str, str] = field(default_factory=dict[str, str])
    converted: dict[str, int] = field(default_factory=dict[str, int])
    columns_ignored: dict[str, int] = field(default_factory=dict[str, int])
    columns_unused: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    @property
    def held_out(self) -> tuple[str, list[Example]]:
        """(split, rows) of the final evaluation: test if there are any, else validation."""
        return ("test", self.test) if self.test else ("validation", self.validation)
