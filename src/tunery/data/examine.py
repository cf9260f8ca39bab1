"""Files of rows with all their problems as values, for those who show them: a server, a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunery.config import DataConfig, KindName
from tunery.data.detect import Shape, detect
from tunery.data.example import Example, Problem
from tunery.data.kinds.values import label_map
from tunery.data.prepare import make_renderer, render_all
from tunery.data.read import Log, OpenedSource, collected_labels
from tunery.errors import TuneryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "(file)"
"""The field of a problem that concerns a whole file; its line is 0."""


@dataclass(frozen=True)
class Examined:
    """What files hold, good and bad.

    Attributes:
        kind: of the rows; None if it cannot be told.
        columns: role → column, as in tunery.data.example.DataSet.
        labels: classification: the label names.
        examples: the rows that can be used, in order.
        problems: everything that is wrong, file by file in the order of the lines.
        rows: found, bad ones included.
        notes: what was decided while reading, a sentence each.
    """

    kind: KindName | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    labels: tuple[str, ...] = ()
    examples: list[Example] = field(default_factory=list[Example])
    problems: list[Problem] = field(default_factory=list[Problem])
    rows: int = 0
    notes: list[str] = field(default_factory=list[str])


def examine_files(
    paths: Sequence[str],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    split: str = "train",
    like: Examined | None = None,
) -> Examined:
    """Look at every row of some files that belong together. Nothing is raised for what they hold.

    Args:
        paths: as in `data.train`.
        config: kind, columns and labels, where they are set. Its own files are not looked at.
        tokenizer: of the model; with it, rows that its chat template refuses are problems too.
        split: taken from a data set that has several.
        like: the training rows, for files beside them: what was settled there (kind, columns, labels) holds here.
    """
    reading = _Reading(config, like if like is not None and like.kind is not None else None)
    try:
        reading.read(paths, split)
    except TuneryError as error:
        reading.add(error.message, error.hint or "give another file")
    examples, log, shape = reading.examples, reading.log, reading.shape
    if tokenizer is not None:
        renderer = make_renderer(tokenizer, config, reading.labels)
        examples = [examples[number] for number, _ in render_all(renderer, examples, log.problems)]
    order = {shown: number for number, shown in enumerate(reading.shown)}
    return Examined(
        kind=None if shape is None else shape.kind,
        columns={} if shape is None else shape.columns,
        labels=reading.labels,
        examples=examples,
        problems=sorted(log.problems, key=lambda problem: (order.get(problem.file, 0), problem.line)),
        rows=log.rows_read,
        notes=log.facts()["notes"],
    )


class _Reading:
    """Files on their way through the reader.

    Attributes:
        shown: how messages name the files opened so far.
    """

    def __init__(self, config: DataConfig, like: Examined | None) -> None:
        self.config, self.like, self.log = config, like, Log(config)
        self.shape = None if like is None or like.kind is None else Shape(like.kind, like.columns)
        if self.shape is not None:
            self.log.settle(self.shape)
        self.labels: tuple[str, ...] = () if like is None else like.labels
        self.examples: list[Example] = []
        self.shown: list[str] = []

    def add(self, message: str, fix: str) -> None:
        """Note a problem with the file at hand."""
        self.log.problems.append(Problem(self.shown[-1], 0, FILE, message, fix))

    def read(self, paths: Sequence[str], split: str) -> None:
        """Read all rows.

        Raises:
            TuneryError: about the last of `shown`, which cannot be read (on).
        """
        heads: list[OpenedSource] = []
        for path in paths:
            self.shown.append(path)
            heads.append(self.log.open(path, split))
            self.shown[-1] = heads[-1].source.shown
        values = [row.value for head in heads for row in head.rows]
        if self.shape is None and values:
            self.shape = detect(values, self.config)
            self.log.settle(self.shape)
        known = self._known_labels()
        self.shown = []
        for head in heads:
            self.shown.append(shown := head.source.shown)
            found = self.log.read(head, known, split)
            self.examples += found
            if not found and not any(problem.file == shown for problem in self.log.problems):
                self.add("it holds no rows", "add some, or name another file")
        self.log.check_columns()
        if self.shape is not None and self.shape.rules.labelled:
            self.labels = tuple(dict.fromkeys((known or collected_labels(self.examples, self.log)).values()))

    def _known_labels(self) -> dict[str, str] | None:
        given = self.config.labels if self.config.labels is not None else self.labels
        return label_map(given) if given else None
