"""Rows out of Parquet files, folders saved by the `datasets` library, and the Hugging Face hub."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from tunery.data.row_report import without_nulls
from tunery.data.source import EXTENSIONS, Item, RawRow, Source, printable, shown_path
from tunery.errors import ConfigError, DataError, NotInstalledError
from tunery.paths import file_sha256
from tunery.versions import install_command

_BATCH_ROWS = 1000
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[^:\s]+))?")


def _library(module: str, shown: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise NotInstalledError(
            f"{shown}: reading this needs the `datasets` library", install_command("datasets")
        ) from None


@contextmanager
def _words_for_failures(what: str, kind: type[ConfigError] | type[DataError], hint: str) -> Generator[None]:
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:  # these libraries document no exception types of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise kind(f"{what}: {reason}", hint) from error


def parquet_rows(path: Path, source: Source) -> Iterator[Item]:
    """The records of a Parquet file. Raises DataError when it is not one."""
    parquet = _library("pyarrow.parquet", source.shown)
    failures = _words_for_failures(f"{source.shown} cannot be read", DataError, "is it a whole Parquet file?")
    with failures, parquet.ParquetFile(path) as file:
        names: list[str] = file.schema_arrow.names
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(
                f"{source.shown} has the column {printable(twice[0])} more than once", "give every column its own name"
            )
        yield from _records(file.iter_batches(_BATCH_ROWS))


def _records(batches: Iterator[Any]) -> Iterator[Item]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield RawRow(number, {name: without_nulls(value) for name, value in record.items()})


def open_folder(path: Path, split: str, source: Source) -> Source:
    """A folder saved by `datasets`; of several splits the one called `split`. Raises ConfigError or DataError."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(name for name in os.listdir(path) if name.lower().endswith(EXTENSIONS))[:8]
        hint = f"name a file in it: {', '.join(files)}" if files else "give a file, or a folder saved by `datasets`"
        raise ConfigError(f"{source.shown} is a folder, and not one saved by `datasets`", hint)
    datasets = _library("datasets", source.shown)
    with _words_for_failures(f"{source.shown} cannot be read", DataError, "save it again with save_to_disk"):
        data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ConfigError(
                f"{source.shown} has no split {split}; it has {', '.join(data)}",
                f"name one: {source.shown}{os.sep}{next(iter(data), 'SPLIT')}",
            )
        source.notes.append(f"{source.shown}: the split {split} is used.")
        data, path = data[split], path / split
    for file in sorted(path.glob("*")):
        if file.is_file():
            source.hashes[shown_path(file)] = file_sha256(file)
    return _from_dataset(data, source)


def open_hub(name: str, split: str) -> Source:
    """A data set of the hub, named "hub:OWNER/NAME" or "hub:OWNER/NAME:SPLIT". Raises ConfigError."""
    parts = _HUB_NAME.fullmatch(name.removeprefix("hub:"))
    if parts is None:
        raise ConfigError(f"{name} is not a data set's name", "write hub:OWNER/NAME or hub:OWNER/NAME:SPLIT")
    datasets = _library("datasets", name)
    hint = "check the name and the split, the network (HF_HUB_OFFLINE), and for private data HF_TOKEN"
    with _words_for_failures(f"{name} cannot be loaded", ConfigError, hint):
        # datasets 3 would otherwise ask at the terminal whether to run a data set's own code
        data = datasets.load_dataset(parts["name"], split=parts["split"] or split, trust_remote_code=False)
    source = Source(name, notes=[] if parts["split"] else [f"{name}: the split {split} is used."])
    source.hashes[name] = str(data._fingerprint)
    return _from_dataset(data, source)


def _from_dataset(data: Any, source: Source) -> Source:
    for column, feature in data.features.items():
        if type(feature).__name__ == "ClassLabel":
            known = ", ".join(f"{number}: {name}" for number, name in enumerate(feature.names[:20]))
            source.notes.append(f"{source.shown} names the classes of {column}: data.labels could be {{{known}}}.")

    def items() -> Iterator[Item]:
        with _words_for_failures(f"{source.shown} cannot be read", DataError, "load it anew"):
            # Arrow tables leave images and sound as bytes: no decoder for them is needed
            yield from _records(data.with_format("arrow").iter(_BATCH_ROWS))

    source.items = items()
    return source
