"""`tunery predict`: a file of rows in, the same rows with what the tuned model says of them out.

While it works, finished rows are added to OUT.partial-….jsonl and handed to the disk, some at a time; the name
says which run, rows and settings they belong to. The same call resumes from it, and OUT itself is whole or absent.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.data.formats import open_source
from tunery.data.source import Source, printable
from tunery.errors import ConfigError, DataError, StoppedError
from tunery.evaluation.predict import (
    AskedRow,
    Shortened,
    not_asked,
    predict_all,
    read_asked,
    without_prediction,
)
from tunery.given_rows import plain_row
from tunery.inference.generate import Sampling
from tunery.jsonl import JsonMapping, JsonObject, append_lines, encode_line, read_lines
from tunery.paths import cache_dir, disk_errors, lock, text_sha256, write_atomic
from tunery.progress import Note, Progress
from tunery.records.prediction_record import STANDARD, Prediction, PredictionSummary
from tunery.records.run_receipt import Receipt
from tunery.text import plural

if TYPE_CHECKING:
    from tunery.evaluation.tuned import TunedModel

SECONDS = 5.0
"""Between two remarks on how far it is."""

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")
_ADDED = tuple(Prediction.model_fields)


@dataclass
class PredictedFile:
    """A file that is to be predicted.

    Args:
        data: a file as in `data.train`, or "-".
        out: a .jsonl or .csv file, or "-" for JSON lines.
        overwrite: replace `out`.
        encoding: of `data` (data.encoding of the task).

    Attributes:
        rows: of the file.
        partial: where finished rows are kept until all are there; None for standard output.
        done: how many of them an interrupted call left there.
    """

    data: str
    out: str
    receipt: Receipt
    sampling: Sampling
    overwrite: bool = False
    encoding: str = "utf-8"
    rows: list[AskedRow] = field(init=False)
    partial: Path | None = field(init=False, default=None)
    done: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Read the rows and see what is done already.

        Raises:
            ConfigError, DataError: the rows cannot be read, or the output cannot be written so.
        """
        self._started = time.perf_counter()
        if self.out != STANDARD:
            _require_writable(Path(self.out), self.data, self.overwrite)
        with _opened(self.data, self.encoding) as source:
            self.rows = read_asked(source, self.receipt.data)
            hashes = sorted(source.hashes.values())
        taken = sorted({name for row in self.rows for name in row.given if name in _ADDED})
        if taken:
            raise ConfigError(
                f"{source.shown} has a column {taken[0]!r} already, which predictions are written to", "rename it"
            )
        key = json.dumps([self.receipt.adapter.sha256, hashes, vars(self.sampling)], sort_keys=True)
        self._key = text_sha256(key)[:12]
        if self.out != STANDARD:
            out = Path(self.out)
            self.partial = out.with_name(f"{out.name}.partial-{self._key}.jsonl")
            self.done = min(_whole_lines(self.partial), len(self.rows))

    def predict(self, load: Callable[[], TunedModel], progress: Progress) -> PredictionSummary:
        """Predict what is missing, and write the output.

        Args:
            load: gives the tuned model; not called where every row is done.

        Raises:
            StoppedError: interrupted; the rows that are done are kept.
            DataError: everything is written, and there are rows without a prediction.
        """
        shortened = Shortened()
        with self._alone():
            if self.done:
                progress.note(Note(f"resuming after {plural(self.done, 'row')} of an interrupted call"))
            if unasked := not_asked(self.rows, self.receipt.data):
                named = ", ".join(map(printable, unasked))
                progress.note(Note(f"not put to the model, because the run was trained without it: {named}", "warn"))
            if self.done < len(self.rows):
                self._work(load(), progress, shortened)
            said = self._finish()
        error = without_prediction(self.rows, said)
        if error is not None:
            raise error
        return self._summary(said, shortened)

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        if self.partial is None:
            yield
            return
        name = text_sha256(str(self.partial.resolve()))[:16]
        hint = "wait for it, or name another file with --out"
        with lock(cache_dir() / "locks" / f"{name}.lock", f"another process is writing {self.out}", hint):
            yield

    def _work(self, tuned: TunedModel, progress: Progress, shortened: Shortened) -> None:
        at, told = self.done, time.perf_counter()
        self._said: list[JsonObject] = []
        try:
            for part in predict_all(tuned, self.rows[self.done :], self.sampling, progress.note, shortened):
                lines = [said.as_json() for said in part]
                self._write(self.rows[at : at + len(part)], lines)
                at += len(part)
                if time.perf_counter() - told > SECONDS and at < len(self.rows):
                    progress.note(Note(f"{at:,} of {len(self.rows):,} rows predicted"))
                    told = time.perf_counter()
        except KeyboardInterrupt:
            kept = f"are kept in {self.partial}" if self.partial else "were written"
            hint = "run the same command again to predict the others" if self.partial else None
            raise StoppedError(f"interrupted; {at:,} of {len(self.rows):,} rows {kept}", hint) from None

    def _write(self, rows: Sequence[AskedRow], said: Sequence[JsonObject]) -> None:
        lines = [{**plain_row(row.given), **one} for row, one in zip(rows, said, strict=True)]
        if self.partial is not None:
            append_lines(self.partial, lines)
            return
        self._said += said
        sys.stdout.write("".join(map(encode_line, lines)))
        sys.stdout.flush()

    def _finish(self) -> list[JsonObject]:
        """Put the output in place; what was said of each row."""
        if self.partial is None:
            return self._said
        lines, out = read_lines(self.partial)[: len(self.rows)], Path(self.out)
        if out.suffix.lower() in _DELIMITERS:
            write_atomic(out, _table(lines, _DELIMITERS[out.suffix.lower()]))
            self.partial.unlink()
        else:
            with disk_errors(self.out):
                os.replace(self.partial, out)
        return lines

    def _summary(self, said: Sequence[JsonObject], shortened: Shortened) -> PredictionSummary:
        labels = self.receipt.data.labels
        found = Counter(one["prediction"] for one in said)
        return PredictionSummary(
            data=self.data,
            out=self.out,
            rows=len(self.rows),
            predicted=sum(one["prediction"] is not None for one in said),
            cut=sum(bool(one.get("cut")) for one in said),
            shortened=shortened.count,
            resumed_from=self.done,
            seconds=round(time.perf_counter() - self._started, 2),
            **({"labels": {label: found[label] for label in labels}} if labels else {}),
        )


# --------------------------------------------------------------------------- files


def _require_writable(out: Path, data: str, overwrite: bool) -> None:
    suffix = out.suffix.lower()
    if suffix not in (*_LINES, *_DELIMITERS):
        raise ConfigError(f"--out {out}: predictions are written as .jsonl or .csv", "name such a file, or - to print")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder", f"name a file in it: {out / 'predictions.jsonl'}")
    if data != STANDARD and out.exists() and Path(data).expanduser().exists() and out.samefile(Path(data).expanduser()):
        raise ConfigError(f"--out {out} is the file of the rows itself", "name another file")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out} is there already", "name another file, or add --overwrite")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: its folder cannot be made: {error.strerror}", "name another file") from None
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: no permission to write into that folder", "name another file")


@contextlib.contextmanager
def _opened(data: str, encoding: str) -> Iterator[Source]:
    """The rows of a file, or of standard input: JSON lines where it begins with a brace, else CSV."""
    if data != STANDARD:
        yield open_source(data, "test", encoding)
        return
    if sys.stdin.isatty():
        raise ConfigError("--data - reads rows from standard input, and nothing is piped in", "name a file")
    content = sys.stdin.buffer.read()
    if not content.strip():
        raise DataError("standard input holds no rows", "pipe in JSON lines, or CSV with a header")
    suffix = {b"{": ".jsonl", b"[": ".json"}.get(content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1], ".csv")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"rows{suffix}"
        file.write_bytes(content)
        source = open_source(str(file), "test")
        source.shown = "standard input"
        yield source


def _whole_lines(path: Path) -> int:
    """How many whole lines a file has; what a crash left of another one is cut off."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    return len(read_lines(path))


def _table(lines: Sequence[JsonObject], delimiter: str) -> str:
    """The lines as a table; each probability in a column of its own, other lists and objects as JSON."""
    flat = [_flat(line) for line in lines]
    names = list(dict.fromkeys(name for line in flat for name in line))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(line.get(name)) for name in names] for line in flat)
    return text.getvalue()


def _flat(line: JsonMapping) -> JsonObject:
    shares = line.get("probabilities")
    plain = {name: value for name, value in line.items() if name != "probabilities"}
    return {**plain, **{f"probability of {label}": share for label, share in shares.items()}} if shares else plain


def _cell(value: object) -> object:
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else value
