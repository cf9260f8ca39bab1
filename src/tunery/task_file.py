"""Reading a task file.

A task file is YAML. Unknown keys are errors with a did-you-mean, duplicate keys are errors, and every error names
file:line:field. Paths in the file are relative to the file; paths given otherwise to the current folder. Labels are
texts as they are written: `no`, `yes` and `010` are words there, not what YAML 1.1 makes of them.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import BaseModel, ValidationError

from tunery.config import BUILT_IN_MODELS, QUOTED_NUMBER, Task, sections
from tunery.config_help import meant_setting, where_described
from tunery.errors import ConfigError
from tunery.given_rows import is_rows, keep_rows
from tunery.jsonl import JsonObject
from tunery.paths import safe_name

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

FieldPath = tuple[str, ...]

_LABELS = ("data", "labels")

_MOST_VALUES = 100_000
"""In one task file."""


class _Marks:
    """Line numbers of a YAML document's fields: ("lora", "rank") → 12. `file` is "" where there is no file."""

    def __init__(self, file: str):
        self.file = file
        self.lines: dict[FieldPath, int] = {}
        self.values = 0

    def count(self) -> None:
        """One more value. A few hundred bytes of nested aliases stand for billions."""
        self.values += 1
        if self.values > _MOST_VALUES:
            raise ConfigError(
                f"{self.file}: more than {_MOST_VALUES:,} values, aliases (*name) counted each time",
                "a task file holds a few dozen settings",
            )

    def where(self, field: FieldPath) -> str:
        if not self.file:
            return ".".join(field) or "the settings"
        known = next((field[:end] for end in range(len(field), 0, -1) if field[:end] in self.lines), None)
        line = self.lines[known] if known else 1
        return f"{self.file}:{line}:{'.'.join(field) or '(top)'}"


def _construct(node: yaml.Node, loader: yaml.SafeLoader, marks: _Marks, at: FieldPath = ()) -> object:
    """PyYAML's own scalars, but with line numbers kept, duplicate keys refused, and labels as they are written."""
    marks.count()
    if isinstance(node, yaml.MappingNode):
        result: dict[object, object] = {}
        merges = any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value)
        loader.flatten_mapping(node)  # `<<: *name` puts the named keys first, and own keys then replace them
        for key_node, value_node in node.value:
            key = (
                key_node.value
                if at == _LABELS and _is_plain(key_node)
                else loader.construct_object(key_node, deep=True)
            )
            field = (*at, str(key))
            if key in result and not merges:
                raise ConfigError(
                    f"{marks.file}:{key_node.start_mark.line + 1}:{'.'.join(field)}: this key stands twice "
                    f"(first on line {marks.lines[field]})",
                    "keep one of them",
                )
            marks.lines[field] = key_node.start_mark.line + 1
            result[key] = _construct(value_node, loader, marks, field)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, loader, marks, (*at, str(index))) for index, child in enumerate(node.value)]
    if at[:-1] == _LABELS and _is_plain(node):
        if loader.construct_object(node) is None:
            where = f"{marks.file}:{node.start_mark.line + 1}:{'.'.join(at)}"
            raise ConfigError(f"{where}: a label has no word", "write one; if it is the word null, put it in quotes")
        return node.value
    return loader.construct_object(node, deep=True)


def _is_plain(node: yaml.Node) -> bool:
    """Whether a node is a word that YAML may take for something else: without quotes, and without a tag."""
    return isinstance(node, yaml.ScalarNode) and node.style is None


def _parse(text: str, marks: _Marks, at: FieldPath = ()) -> object:
    """The value of a YAML text that stands at a field; None for an empty one."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _construct(node, loader, marks, at)
    finally:
        loader.dispose()


def _read_yaml(path: Path, marks: _Marks) -> JsonObject:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no task file at {path}", "make one with `tunery init classify my-task`") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder", f"name the task file in it: {path / 'task.yaml'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "a task file is YAML text in UTF-8") from None
    try:
        value = _parse(text, marks)
        value = {} if value is None else value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        words = error.problem or error.context
        raise ConfigError(f"{path}:{line}: not valid YAML: {words}", "fix that line") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        words = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path}: not valid YAML: {words}", "a task file holds settings (key: value)") from None
    if not isinstance(value, dict):
        told = f"{path}:1: a task file holds settings (key: value), not a {type(value).__name__}"
        raise ConfigError(told, f"if it holds your rows: tunery train --model MODEL --data {path}")
    return value


def _apply_override(values: JsonObject, assignment: str) -> FieldPath:
    key, equals, raw = assignment.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {assignment}: not of the form key=value", "for example --set lora.rank=8")
    field = tuple(key.strip().split("."))
    try:
        value = _parse(raw, _Marks(f"--set {key.strip()}"), field)
    except (yaml.YAMLError, ValueError):  # such as name=2024-13-45, which YAML takes for a date
        value = raw
    target = values
    for part in field[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    target[field[-1]] = value
    return field


_SHORT = reprlib.Repr()
"""For values in messages."""
_SHORT.maxstring = _SHORT.maxother = 200


def _explain(error: ErrorDetails, field: FieldPath) -> str:
    kind, given = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return f"unknown setting; {meant_setting(field)}"
    if kind == "missing":
        return "this setting is needed"
    message = error["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}" + (
        f" (got {_SHORT.repr(given)})" if not isinstance(given, dict) else ""
    )


def _config_error(
    error: ValidationError, marks: _Marks, overridden: set[FieldPath], given: set[FieldPath]
) -> ConfigError:
    lines: dict[str, FieldPath] = {}
    for item in error.errors():
        field: FieldPath = ()
        for part in map(str, item["loc"]):  # pydantic adds the names of union members: keep only real fields
            if (
                (*field, part) in marks.lines
                or (*field, part) in overridden | given
                or _is_setting((*field, part))
                or item["type"] in ("extra_forbidden", "missing")
            ):
                field = (*field, part)
        place = marks.where(field) if field not in given else ".".join(field)
        place = f"--set {'.'.join(field)}" if field in overridden else place
        lines[f"{place}: {_explain(item, field)}"] = field
    return ConfigError("\n".join(lines), where_described(list(lines.values())))


def _is_setting(field: FieldPath) -> bool:
    return any((*path, name) == field for path, section in sections(Task) for name in section.model_fields)


def _looks_like_path(value: str) -> bool:
    return (
        bool(value.strip())
        and not value.startswith(("hub:", "openai:"))
        and "://" not in value
        and not QUOTED_NUMBER.fullmatch(value)
    )


def _absolute(base: Path, value: str) -> str:
    """A path seen from `base`, ~ and .. taken out; links stay, so that messages name what a person wrote."""
    return os.path.abspath(base / os.path.expanduser(value))


def _anchored(field: FieldPath, only: set[FieldPath] | None) -> bool:
    return only is None or field in only


def _anchor(values: JsonObject, base: Path, only: set[FieldPath] | None = None) -> None:
    """Make the paths among `values` absolute, seen from `base`."""
    data = values.get("data")
    if isinstance(data, dict):
        for key in ("train", "validation", "test"):
            if not _anchored(("data", key), only):
                continue
            value = data.get(key)
            if isinstance(value, str) and _looks_like_path(value):
                data[key] = _absolute(base, value)
            elif isinstance(value, list):
                data[key] = [_absolute(base, v) if isinstance(v, str) and _looks_like_path(v) else v for v in value]
    lora = values.get("lora")
    if isinstance(lora, dict) and isinstance(lora.get("start"), str) and _anchored(("lora", "start"), only):
        lora["start"] = _absolute(base, lora["start"])
    hosted = values.get("hosted")
    if isinstance(hosted, dict) and isinstance(hosted.get("prices"), str) and _anchored(("hosted", "prices"), only):
        hosted["prices"] = _absolute(base, hosted["prices"])
    model = values.get("model")
    if isinstance(model, str) and model.strip() and _anchored(("model",), only):
        local = base / Path(model).expanduser()
        if model.startswith((".", "~")) or model.endswith(".gguf") or (local.exists() and model not in BUILT_IN_MODELS):
            values["model"] = str(local.resolve())


def absolute(task: Task) -> Task:
    """The task with its paths made absolute, seen from the current folder, so that it can be read elsewhere.

    Settings that were left out stay so: what a person set can still be told from what follows.
    """
    values = task.model_dump(mode="json", exclude_unset=True)
    _anchor(values, Path.cwd())
    return Task.model_validate(values)


def load_task(
    path: str | Path | None, overrides: Sequence[str] = (), settings: Mapping[str, object] | None = None
) -> Task:
    """Read a task file.

    Args:
        path: the YAML file; None for a task that consists of `settings` and `overrides` alone.
        overrides: "key.sub=value" assignments, as given with `--set`; values are read as YAML.
        settings: values by setting ("lora.rank") or section ({"rank": 8} for "lora"). Files to train on may stand under
            "data" alone. They come before `overrides`.

    Raises:
        ConfigError: with one line "file:line:field: what is wrong" for each wrong setting.
    """
    if path is None:
        if not settings and not overrides:
            raise ConfigError("no task is named", "name a task file, or a model and data (--model MODEL --data FILE)")
        return _validated({}, _Marks(""), overrides, settings or {})
    path = Path(path)
    marks = _Marks(str(path))
    values = _read_yaml(path, marks)
    _anchor(values, path.parent)
    values.setdefault("name", _default_name(path))
    return _validated(values, marks, overrides, settings or {})


def resolve_task(
    task: str | Path | Task | None, overrides: Sequence[str] = (), settings: Mapping[str, object] | None = None
) -> Task:
    """As `load_task`; a Task that is given keeps its settings but for those that are overridden, with absolute paths.

    Raises:
        ConfigError: as `load_task`.
    """
    if not isinstance(task, Task):
        return load_task(task, overrides, settings)
    task = absolute(task)
    if not overrides and not settings:
        return task
    return _validated(task.model_dump(mode="json", exclude_unset=True), _Marks(""), overrides, settings or {})


def _validated(values: JsonObject, marks: _Marks, overrides: Sequence[str], settings: Mapping[str, object]) -> Task:
    output = Path(str(settings.get("output") or values.get("output") or Task.model_fields["output"].default))
    given = _apply_settings(values, settings, Path.cwd() / output)
    overridden = {_apply_override(values, assignment) for assignment in overrides}
    _anchor(values, Path.cwd(), only=given | overridden)
    if "name" not in values and (name := _name_of_data(values)):
        values["name"] = name
    try:
        return Task.model_validate(values)
    except ValidationError as error:
        raise _config_error(error, marks, overridden, given) from None


def _apply_settings(
    values: JsonObject, settings: Mapping[str, object], output: Path, at: FieldPath = ()
) -> set[FieldPath]:
    """Put settings among the values; the fields that were set. `output`: where rows given in Python are kept."""
    found: set[FieldPath] = set()
    known = dict(sections(Task))
    for key, value in settings.items():
        field = (*at, *key.split("."))
        if field == _DATA and not isinstance(value, Mapping | BaseModel):
            field = _TRAIN_FILES
        if field in known and isinstance(value, Mapping | BaseModel):
            inner = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
            found |= _apply_settings(values, inner, output, field)
            continue
        if field in _FILES and is_rows(value):
            value = keep_rows(value, output)
        target = values
        for part in field[:-1]:
            target[part] = target[part] if isinstance(target.get(part), dict) else {}
            target = target[part]
        target[field[-1]] = _plain(value)
        found.add(field)
    return found


_DATA, _TRAIN_FILES = ("data",), ("data", "train")
_FILES = (_TRAIN_FILES, ("data", "validation"), ("data", "test"))


def _plain(value: object) -> object:
    """As a YAML file would hold it."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _name_of_data(values: JsonObject) -> str | None:
    """The name of a run that has no task file: that of its first file."""
    data = values.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    first = train[0] if isinstance(train, list) and train else train
    return name_after(first) if isinstance(first, str) and first.strip() else None


def name_after(source: str) -> str | None:
    """The name of a run, or a folder, for the rows of a source; None where the source gives none."""
    return safe_name(Path(source.removeprefix("hub:").partition(":")[0]).stem).lstrip("_-.") or None


def _default_name(path: Path) -> str:
    return safe_name(path.resolve().parent.name if path.stem == "task" else path.stem)
