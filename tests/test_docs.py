"""The pages say what is true: commands parse, settings exist, links and the annotated tree lead to files."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import tunery
from tunery.cli import cli
from tunery.config import all_settings
from tunery.task_file import load_task

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
SETTINGS = {name for name, _ in all_settings()}
CODE_LINE = re.compile(r"^(?: {4,}|# {3,})(tunery [a-z-].*)$", re.MULTILINE)


def _page_ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_reference_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_reference.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------- commands


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every `tunery …` command in a page: lines of code, and inline code that is complete."""
    inline = re.findall(r"`(tunery [a-z-][^`\n]*)`", text)
    for line in (*CODE_LINE.findall(text), *inline):
        words = shlex.split(re.split(r" {2,}| → ", line)[0], comments=True)
        complete = len(words) > 2 or (len(words) == 2 and words[1].startswith("-"))
        if complete and "…" not in line and "[OPTIONS]" not in line:
            yield words


def all_commands() -> list[list[str]]:
    """Of all pages and of the comments in the templates."""
    templates = ROOT.glob("src/tunery/templates/*/task.yaml")
    return [words for path in (*PAGES, *templates) for words in commands_of(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_command_in_the_pages_parses(words: list[str]) -> None:
    name, arguments = words[1], words[2:]
    if name.startswith("-"):
        with pytest.raises(click.exceptions.Exit) as stop:
            cli.make_context("tunery", words[1:])
        assert stop.value.exit_code == 0
        return
    assert name in cli.commands
    # Prose may name a command without its argument (`tunery check --lr-test`).
    missing_argument = bool(arguments) and all(word.startswith("-") for word in arguments)
    context = cli.commands[name].make_context(name, list(arguments), resilient_parsing=missing_argument)
    for assignment in context.params.get("overrides") or ():
        assert assignment.partition("=")[0] in SETTINGS


def test_the_readme_shows_every_command() -> None:
    shown = {words[1] for words in commands_of((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert set(cli.commands) <= shown


# --------------------------------------------------------------------------- code and settings


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=_page_ids)
def test_python_in_the_pages_uses_what_exists(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tunery":
                assert node.attr in tunery.__all__


def flat(value: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Names of the settings in a piece of a task file."""
    for key, inner in value.items():
        name = f"{at}{key}"
        if isinstance(inner, dict) and name not in SETTINGS:
            yield from flat(inner, f"{name}.")
        else:
            yield name


@pytest.mark.parametrize("page", PAGES, ids=_page_ids)
def test_settings_in_the_pages_exist(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for number, block in enumerate(blocks(text, "yaml")):
        piece = yaml.safe_load(block)
        assert set(flat(piece)) <= SETTINGS
        whole = {"model": "m", **piece, "data": {"train": "rows.csv", **piece.get("data", {})}}
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(whole))
        load_task(tmp_path / f"{number}.yaml")
    records = r"^## The (?:check report|receipt|evaluation)$.*?(?=^## )"  # their fields are no settings
    text = re.sub(records, "", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:data|lora|train|evaluate)\.[a-z_.]+)(?:: [^`]*)?`", text)
    sections = {name.rpartition(".")[0] for name in SETTINGS}
    assert set(inline) <= SETTINGS | sections


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("page", PAGES, ids=_page_ids)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


def annotated_tree() -> list[str]:
    """Paths of the README's list "Code layout"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Code layout")[2].partition("\n## ")[0]
    paths: list[str] = []
    folder = ""
    for indent, name in re.findall(r"^ {4}( *)(\S+)", section, re.MULTILINE):
        folder = "" if not indent else folder
        paths.append(folder + name)
        folder = name if not indent and name.endswith("/") else folder
    return paths


def test_the_annotated_tree_is_the_tree() -> None:
    paths = annotated_tree()
    for path in paths:
        assert (ROOT / path).exists(), path
    source = ROOT / "src" / "tunery"
    entries = [
        entry for entry in source.iterdir() if entry.suffix == ".py" or (entry.is_dir() and entry.name != "__pycache__")
    ]
    listed = {path.removeprefix("src/tunery/").rstrip("/") for path in paths if path.startswith("src/tunery/")}
    assert {entry.name for entry in entries} == listed - {""}


def test_the_makefile_has_every_target_the_pages_name() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:^ {4,}|`)make ([a-z-]+)", text, re.MULTILINE)
        assert set(named) <= targets, page.name
