"""`tunery init` writes folders that work as they are, and never over a user's files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunery.data.read import read_data
from tunery.errors import ConfigError
from tunery.scaffold import create, templates
from tunery.task_file import load_task

KINDS = {
    "classify": "classification",
    "chat": "chat",
    "write": "completion",
    "preference": "preference",
    "feedback": "feedback",
}


def test_every_promised_template_exists() -> None:
    assert set(templates()) == set(KINDS)


@pytest.mark.parametrize("template", sorted(KINDS))
def test_a_new_folder_holds_a_task_and_rows_that_can_be_trained(template: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "my-task"
    written = create(template, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in written)
    task = load_task(folder / "task.yaml")
    assert (task.name, task.data.kind) == ("my-task", KINDS[template])
    data = read_data(task.data, task.seed)
    assert len(data.train) >= 8
    assert len(data.validation) >= 2
    assert not data.skipped


@pytest.mark.parametrize("template", sorted(KINDS))
def test_kind_and_columns_are_found_without_being_set(template: str, tmp_path: Path) -> None:
    create(template, tmp_path)
    task = load_task(tmp_path / "task.yaml", ["data.kind=auto", "data.columns={}"])
    assert read_data(task.data, task.seed).kind == KINDS[template]


@pytest.mark.parametrize("template", sorted(KINDS))
def test_settings_offered_in_comments_are_real(template: str, tmp_path: Path) -> None:
    create(template, tmp_path)
    file = tmp_path / "task.yaml"
    file.write_text(re.sub(r"^( *)# ( *[a-z_]+:.*)$", r"\1\2", file.read_text(), flags=re.MULTILINE))
    task = load_task(file)
    assert task.train.early_stopping_patience == 2
    assert task.train.learning_rate == 2e-4
    assert task.lora.rank == 16


def test_existing_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds rows\.csv"):
        create("classify", tmp_path)
    assert (tmp_path / "rows.csv").read_text() == "mine"
    assert not (tmp_path / "task.yaml").exists()


def test_other_files_in_the_folder_do_not_disturb(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    create("chat", tmp_path)
    assert (tmp_path / "task.yaml").exists()


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        create("chat", tmp_path / "taken")


@pytest.mark.parametrize(
    ("typed", "meant"), [("clasify", "classify"), ("classification", "classify"), ("writing", "write")]
)
def test_a_misspelt_template_is_answered_with_the_nearest(typed: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        create(typed, tmp_path / "new")
    assert f"did you mean {meant}?" in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "new").exists()
