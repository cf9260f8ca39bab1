"""`tunery settings`: whoever has only the installed package finds out what every setting means."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tunery.cli import cli
from tunery.config import all_settings
from tunery.config_help import setting_help
from tunery.errors import ConfigError
from tunery.task_file import load_task

SOURCE = Path(__file__).parent.parent / "src" / "tunery"


def said(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["settings", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_all_settings_in_a_line_each() -> None:
    lines = said().splitlines()
    for name, info in all_settings():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert info.description
        assert info.description[:40] in line


def test_one_setting_with_all_about_it() -> None:
    text = said("lora.rank")
    for words in ("the width of the low-rank update", "whole number > 0", "default:  16", "--set lora.rank=16"):
        assert words in text
    assert "    lora:\n      rank: 16\n" in text
    assert said("rank") == text


def test_a_section_lists_its_settings() -> None:
    names = [setting.name for setting in setting_help("data.columns")]
    assert names == [name for name, _ in all_settings() if name.startswith("data.columns.")]
    assert set(names) < {setting.name for setting in setting_help("data")}
    assert all(setting["section"] == "lora" for setting in json.loads(said("lora", "--json")))


@pytest.mark.parametrize(("typed", "meant"), [("lora.rnak", "lora.rank"), ("epoch", "train.epochs")])
def test_a_misspelt_name_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {re.escape(meant)}"):
        setting_help(typed)


def test_a_name_that_is_like_none_points_to_the_list() -> None:
    for name in ("", "xyzzy", "a.b..c"):
        with pytest.raises(ConfigError) as caught:
            setting_help(name)
        assert caught.value.hint == "`tunery settings` lists them all"


def test_the_examples_are_task_files(tmp_path: Path) -> None:
    """Each as it is printed, but for those whose value a person has to choose."""
    for setting in setting_help():
        piece = yaml.safe_load(setting.example())
        if "VALUE" in setting.example():
            continue
        whole = {"model": "m", **piece, "data": {"train": "rows.csv", **piece.get("data", {})}}
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(whole))
        load_task(tmp_path / "task.yaml")


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        (["lora.rank=-1"], "`tunery settings lora.rank` describes it"),
        (["lora.rank=-1", "lora.alpha=-1"], "`tunery settings lora` describes them"),
        (["lora.rnak=1"], "`tunery settings lora` describes them"),
        (["lora.rank=-1", "train.epochs=-1"], "`tunery settings` lists every setting"),
        (["lroa=1"], "`tunery settings` lists every setting"),
    ],
)
def test_errors_name_the_command_that_helps(settings: list[str], hint: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("model: m\ndata:\n  train: rows.csv\n")
    with pytest.raises(ConfigError) as caught:
        load_task(tmp_path / "task.yaml", settings)
    assert caught.value.hint == hint


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the string nodes that stand alone."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def test_no_message_points_to_a_file_that_an_installed_package_lacks() -> None:
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        alone = docstrings(tree)
        found += [
            f"{file.name}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in alone
            and re.search(r"\bdocs/[a-z-]+\.md", node.value)
        ]
    templates = [path for path in SOURCE.glob("templates/*/*.yaml") if "docs/" in path.read_text(encoding="utf-8")]
    assert not found, found
    assert not templates, templates
