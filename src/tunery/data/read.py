"""From `data` settings to a `DataSet`: open, detect, validate, split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tunery.config import DataConfig, KindName
from tunery.data.detect import Shape, check_columns, detect
from tunery.data.example import DataSet, Example, Problem, ReadFacts
from tunery.data.formats import open_source
from tunery.data.kinds.values import label_map
from tunery.data.pace import Pace
from tunery.data.problem_list import bad_rows
from tunery.data.row_report import Tally
from tunery.data.rows import check_row
from tunery.data.source import Item, RawRow, Source, printable
from tunery.data.split import draw, hold_out, shuffled, without_duplicates, without_texts
from tunery.data.unused import UnusedColumns
from tunery.errors import ConfigError, DataError
from tunery.progress import Say
from tunery.text import plural

MOST_LABELS = 100
_DETECTION_ROWS = 1000


def read_data(config: DataConfig, seed: int, say: Say | None = None) -> DataSet:
    """Read, check and split all rows of a task.

    Args:
        config: the `data` section, with absolute paths (as `load_task` leaves them).
        seed: of the split, and of the draw of `max_rows`.
        say: told how far reading is, where it lasts.

    Raises:
        ConfigError: a file, column or kind that does not exist or cannot be told; a split that cannot be made.
        DataError: bad rows, each as file:line:field with its fix (up to 100); a file without a good row.
    """
    log = Log(config, say)
    heads = [log.open(path, "train") for path in config.train_files]
    values = [row.value for head in heads for row in head.rows]
    if not values:
        for head in heads:
            log.read(head, None)
        raise log.empty(heads[0].source.shown)
    log.settle(detect(values, config))
    labels = label_map(config.labels) if config.labels is not None else None
    train = [example for head in heads for example in log.read(head, labels)]
    if log.shape.rules.labelled and labels is None and train:
        labels = collected_labels(train, log)
    parts: dict[str, list[Example]] = {}
    for part, path in (("validation", config.validation), ("test", config.test)):
        parts[part] = log.read(log.open(path, part), labels, part) if isinstance(path, str) else []
    log.finish()
    names = tuple(dict.fromkeys((labels or {}).values()))
    _refuse_single_label(names)
    return _split(config, seed, log, names, train, **parts)


def read_more(
    path: str, like: DataConfig, kind: KindName, labels: Sequence[str], columns: Mapping[str, str]
) -> DataSet:
    """Read one further file to evaluate on, as the rows of a finished task were read.

    Args:
        path: a file, folder or hub name; a relative path is seen from the current folder.
        like: the `data` settings of the task (label map, what to do with bad rows).
        kind, labels, columns: as settled when the task was read.

    Returns:
        A data set whose rows are all in `test`, in file order, with what was skipped and decided beside them.

    Raises:
        ConfigError, DataError: as `read_data`.
    """
    log = Log(like)
    log.settle(Shape(kind, dict(columns)), settled=True)
    known = label_map(like.labels if like.labels is not None else tuple(labels)) if labels else None
    rows = log.read(log.open(path, "test"), known, "test")
    log.finish()
    return DataSet(
        kind=kind,
        columns=dict(columns),
        labels=tuple(labels),
        train=[],
        validation=[],
        test=rows,
        **log.facts(),
    )


@dataclass
class OpenedSource:
    """A source whose first rows have been looked at, for detection, and will still be read."""

    source: Source
    seen: list[Item]

    @classmethod
    def of(cls, source: Source) -> OpenedSource:
        seen: list[Item] = []
        rows = 0
        for item in source.items:
            seen.append(item)
            rows += isinstance(item, RawRow)
            if rows == _DETECTION_ROWS:
                break
        return cls(source, seen)

    @property
    def rows(self) -> list[RawRow]:
        return [item for item in self.seen if isinstance(item, RawRow)]

    def items(self) -> Iterator[Item]:
        return itertools.chain(self.seen, self.source.items)


@dataclass
class Log:
    """Reads sources, and keeps what that brings to light besides the rows.

    Attributes:
        config: what to do with bad rows, columns to leave aside, the encoding.
        say: told how far it is.
    """

    config: DataConfig
    say: Say | None = None
    problems: list[Problem] = field(default_factory=list[Problem])
    rows_read: int = 0
    bad_rows: int = 0
    tally: Tally = field(default_factory=Tally)
    without_rows: list[str] = field(default_factory=list[str])
    files: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])
    sources: list[Source] = field(default_factory=list[Source])

    def __post_init__(self) -> None:
        self.settle(Shape("text", {}))
        self._pace = Pace(self.say, "reading rows")

    @property
    def shape(self) -> Shape:
        """What the rows are."""
        return self.unused.shape

    def settle(self, shape: Shape, settled: bool = False) -> None:
        """Read rows of this shape from here on. `settled`: see UnusedColumns."""
        self.unused = UnusedColumns(shape, self.config, settled)
        self.notes += shape.notes

    def open(self, path: str, part: str) -> OpenedSource:
        """A source, its first rows looked at; of a data set with several splits the one called `part`."""
        return OpenedSource.of(open_source(path, part, self.config.encoding))

    def read(self, head: OpenedSource, labels: Mapping[str, str] | None, part: str = "train") -> list[Example]:
        """The good rows of one source; its bad ones are noted."""
        source = head.source
        examples: list[Example] = []
        check_columns(self.shape, [row.value for row in head.rows], source.shown)
        for item in head.items():
            self.rows_read += 1
            self._pace.at(self.rows_read)
            result = self._row(source.shown, item, labels, part) if isinstance(item, RawRow) else item
            if isinstance(result, list):
                self.bad_rows += 1
                self.problems += result
            else:
                examples.append(result)
        self.files |= source.hashes
        self.sources.append(source)
        if not examples:
            self.without_rows.append(source.shown)
        return examples

    def _row(self, shown: str, row: RawRow, labels: Mapping[str, str] | None, part: str) -> Example | list[Problem]:
        if isinstance(row.value, str):
            return check_row(shown, row, self.shape, labels)
        self.unused.meet(row.value, shown, row.line)
        result = check_row(shown, row, self.shape, labels, self.tally, self.config.ignore_columns)
        if not isinstance(result, list):
            self.unused.compare(row.value, result, part)
        return result

    def finish(self) -> None:
        """Raise DataError or ConfigError for what stands in the way of training."""
        self.check_columns()
        if self.problems and self.config.on_bad_row == "stop":
            raise self._bad_rows(
                "fix these rows or the settings they do not fit, or drop and count them with data.on_bad_row: skip"
            )
        if self.without_rows:
            raise self.empty(self.without_rows[0])

    def check_columns(self) -> None:
        """Raise ConfigError for columns that matter and are not used, once all rows are read."""
        self.unused.ignored += self.tally.set_aside
        self.tally.set_aside.clear()
        self.unused.check()

    def empty(self, shown: str) -> DataError:
        """The error for a source without a single good row."""
        if any(problem.file == shown for problem in self.problems):
            return self._bad_rows(f"no row of {shown} can be used; fix these")
        return DataError(f"{shown} holds no rows", "add some, or name another file")

    def _bad_rows(self, hint: str) -> DataError:
        return bad_rows(self.problems, self.bad_rows, self.rows_read, hint)

    def facts(self) -> ReadFacts:
        """What was read, for a DataSet. Notes of the sources come first, which only grow while they are read."""
        notes = list(dict.fromkeys(note for source in self.sources for note in source.notes))
        notes += [*self.notes, *self.unused.notes()]
        if self.tally.converted:
            forms = ", ".join(
                f"{form} ({plural(count, 'row')})" for form, count in sorted(self.tally.converted.items())
            )
            notes.append(f"Converted to OpenAI's form: {forms}.")
        if self.tally.shortened:
            notes.append(
                f"Conversations whose end, after the last trained answer, was left out: {self.tally.shortened:,}."
            )
        if self.problems and self.config.on_bad_row == "skip":
            notes.append(f"Rows skipped, as data.on_bad_row says: {self.bad_rows:,} of {self.rows_read:,}.")
        return {
            "skipped": self.problems,
            "rows_read": self.rows_read,
            "files": self.files,
            "converted": dict(sorted(self.tally.converted.items())),
            "columns_ignored": dict(self.unused.ignored),
            "columns_unused": list(self.unused.plain),
            "notes": [printable(note, 1000) for note in notes],
        }


def collected_labels(train: Sequence[Example], log: Log) -> dict[str, str]:
    """The label map of a task that gives none: the labels that occur, in order of the alphabet.

    Raises:
        ConfigError: there are too many to be classes.
    """
    names = sorted({example.label for example in train})
    if len(names) > MOST_LABELS:
        raise ConfigError(
            f"the label column holds {len(names):,} different values, such as {', '.join(map(repr, names[:3]))}",
            "is it a class? Set data.columns.label or data.kind, or list the classes in data.labels",
        )
    log.notes.append(f"Labels found: {', '.join(names)}.")
    if len({name.casefold() for name in names}) < len(names):
        log.notes.append("Some labels differ only in upper and lower case; data.labels can map them to one name.")
    return label_map(tuple(names))


def _refuse_single_label(names: tuple[str, ...]) -> None:
    if len(names) == 1:
        raise DataError(
            f"every training row has the label {names[0]!r}", "a classifier needs rows of at least two classes"
        )


def _split(
    config: DataConfig,
    seed: int,
    log: Log,
    labels: tuple[str, ...],
    rows: list[Example],
    validation: list[Example],
    test: list[Example],
) -> DataSet:
    shape = log.shape
    train = without_texts(rows, [*validation, *test])
    overlap = len(rows) - len(train)
    if not train:
        raise DataError(
            "every training row has a text that is also in the validation or test file",
            "name files that do not hold the training rows, or let data.validation be a fraction",
        )
    if only_there := len(validation) - len(validation := without_texts(validation, test)):
        log.notes.append(f"Validation rows left out because their text is in the test file: {only_there:,}.")
    if config.validation is not None and not isinstance(config.validation, str):
        train, validation = _held_out_of(train, config.validation, seed, log)
    else:
        validation = shuffled(validation, seed)
    duplicates = 0
    if config.duplicates == "drop":
        train, duplicates = without_duplicates(train)
    if config.max_rows is not None and config.max_rows < len(train):
        log.notes.append(f"{config.max_rows:,} of {len(train):,} training rows are used (data.max_rows).")
        train = draw(train, config.max_rows, seed)
    if config.duplicates == "keep":
        duplicates = without_duplicates(train)[1]
    unseen = sorted(set(labels) - {row.label for row in train}, key=labels.index)
    if unseen:
        log.notes.append(f"No training row has the label {', '.join(unseen)}.")
    log.notes += shape.rules.notes(train)
    return DataSet(
        kind=shape.kind,
        columns=shape.columns,
        labels=labels if shape.rules.labelled else (),
        train=train,
        validation=validation,
        test=shuffled(test, seed),
        duplicates=duplicates,
        overlap_removed=overlap,
        **log.facts(),
    )


def _held_out_of(rows: list[Example], share: float, seed: int, log: Log) -> tuple[list[Example], list[Example]]:
    train, held = hold_out(rows, share, seed)
    if not held:
        log.notes.append("All rows have the same text or prompt, so none is held out for validation.")
    elif share >= 1 and len(held) != share:
        log.notes.append(f"{len(held):,} rows are held out, not {int(share):,}, because equal texts stay together.")
    return train, held
