"""A noun that a contributor adds is one file: nothing outside its home decides by its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from tunery.config import USUAL_OBJECTIVE, KindName, ObjectiveName, VariantName
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import Kind
from tunery.export.targets import TARGETS
from tunery.lora.variants import VARIANTS
from tunery.training.objectives import OBJECTIVES

SOURCE = Path(__file__).parent.parent / "src" / "tunery"

HOMES = {
    "kind": (set(KINDS), ("data/kinds/", "config.py")),
    "objective": (set(OBJECTIVES), ("training/objectives/", "config.py")),
    "variant": (set(VARIANTS), ("lora/variants/", "config.py")),
    "target": (set(TARGETS), ("export/targets/", "config.py")),
}
"""Noun → its names, and where they may be compared with."""

ALLOWED = {
    ("data/conversation.py", "text"): "type of a part of OpenAI's message content",
    ("data/messages.py", "text"): "type of a part of OpenAI's message content",
    ("serve/engine/requests.py", "text"): "type of OpenAI's response_format",
    ("serve/engine/remote.py", "text"): "type of OpenAI's response_format",
    ("serve/schemas/chat.py", "text"): "type of a part of OpenAI's message content",
    ("serve/schemas/jobs.py", "dpo"): "method.type of OpenAI's job, which has a section of that name",
    ("serve/jobs/translate.py", "lora"): "section of a task file",
    ("evaluation/answers.py", "completion"): "key of a row in a person's file of answers",
}
"""(file, word) → why it is no branch on a noun."""


def compared_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Words that a value is compared with (==, !=, in), or that choose an entry of a dict written down on the spot."""
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.value, ast.Dict):
            parts = [key for key in node.value.keys if key is not None]
        for part in parts:
            inner = part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]
            for each in inner:
                if isinstance(each, ast.Constant) and isinstance(each.value, str):
                    yield node.lineno, each.value  # type: ignore[attr-defined]


def words_outside(noun: str) -> list[tuple[str, int, str]]:
    names, homes = HOMES[noun]
    return [
        (where, line, word)
        for file in sorted(SOURCE.rglob("*.py"))
        if not (where := file.relative_to(SOURCE).as_posix()).startswith(homes)
        for line, word in compared_words(ast.parse(file.read_text(encoding="utf-8")))
        if word in names
    ]


@pytest.mark.parametrize("noun", HOMES)
def test_nothing_outside_its_home_branches_on_a_noun(noun: str) -> None:
    found = [f"{file}:{line}: {word!r}" for file, line, word in words_outside(noun) if (file, word) not in ALLOWED]
    assert not found, found


def test_every_exception_is_still_one() -> None:
    met = {(file, word) for noun in HOMES for file, _, word in words_outside(noun)}
    assert set(ALLOWED) <= met


def test_a_branch_would_be_found() -> None:
    code = "if kind == 'chat': pass\nx = {'dpo': 1}.get(y)\nz = {'text': 1}[y]\nw = kind in ('a', 'preference')"
    words = [word for _, word in compared_words(ast.parse(code))]
    assert sorted(words) == ["a", "chat", "dpo", "preference", "text"]


def test_every_name_in_the_settings_has_its_entry() -> None:
    assert set(get_args(KindName)) == set(KINDS) == set(USUAL_OBJECTIVE)
    assert set(get_args(ObjectiveName)) == set(OBJECTIVES)
    assert set(get_args(VariantName)) == set(VARIANTS)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_kind_says_what_its_columns_are(kind: Kind) -> None:
    from tunery.config import Columns

    assert kind.missing(())
    for role, names in {**kind.required, **kind.optional}.items():
        assert role in Columns.model_fields
        assert role in names


REGISTRIES = (
    *("data/forms", "data/kinds", "lora/variants", "training/objectives", "export/targets"),
    *("serve/routes", "serve/schemas"),
)
"""Folders whose files are named after what they hold, whatever else has that name."""


def test_a_module_name_and_a_class_name_stand_once() -> None:
    modules: dict[str, list[str]] = {}
    classes: dict[str, list[str]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        where = file.relative_to(SOURCE)
        if file.stem != "__init__" and where.parent.as_posix() not in REGISTRIES:
            modules.setdefault(file.stem, []).append(where.as_posix())
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(where.as_posix())
    twice = {name: found for names in (modules, classes) for name, found in names.items() if len(found) > 1}
    assert not twice, twice


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules, and names in modules, that a module imports when it runs, in functions too."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("package", ["src/tunery", "bench"])
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    root = SOURCE.parent.parent / package
    files = {
        ".".join((root.name, *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in root.rglob("*.py")
    }
    # the package itself offers names of all its modules
    arrows = {
        name: {to for to in imported(ast.parse(file.read_text(encoding="utf-8"))) if to in files and to != name}
        for name, file in files.items()
        if name != root.name
    }
    left = dict(arrows)
    while free := [name for name, to in left.items() if not to & set(left)]:
        for name in free:
            del left[name]
    assert not left, {name: sorted(to & set(left)) for name, to in left.items()}
