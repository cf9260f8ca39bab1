"""`tunery init --from FILE`: a task file that trains on the rows as they are, with what was found in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tunery.cli import cli
from tunery.data.read import read_data
from tunery.drafting import draft
from tunery.errors import ConfigError, DataError
from tunery.task_file import load_task


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(rows: int, labels: tuple[str, ...] = ("no", "yes"), name: str = "film reviews.csv") -> str:
    lines = [f"film {i} is fine,{labels[i % len(labels)]},{i}" for i in range(rows)]
    Path(name).write_text("\n".join(["review,sentiment,id", *lines]) + "\n")
    return name


def test_the_task_reads_the_rows_it_was_written_for(here: Path) -> None:
    (path,), notes = draft(table(60))
    assert path == Path("film-reviews/task.yaml")
    task = load_task(path)
    assert (task.name, task.data.kind) == ("film-reviews", "classification")
    assert (task.data.columns.text, task.data.columns.label) == ("review", "sentiment")
    assert task.data.labels == {"no": "no", "yes": "yes"}
    data = read_data(task.data, task.seed)
    assert data.labels == ("no", "yes")
    assert (len(data.train), len(data.validation)) == (42, 18)
    assert "Columns not used: id." in notes
    text = path.read_text()
    assert "# 60 rows" in text
    assert "'no': 'no'    # 30 rows" in text


@pytest.mark.parametrize("rows", [7, 60, 300, 3000, 12_000])
def test_the_held_out_share_suits_the_number_of_rows(rows: int) -> None:
    (path,), _ = draft(table(rows), "task")
    task = load_task(path)
    data = read_data(task.data, task.seed)
    assert len(data.validation) == {7: 0, 60: 18, 300: 60, 3000: 300, 12_000: 1000}[rows]
    assert task.train.epochs == (3 if rows < 1000 else 1)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [{"role": "user", "content": "{i}"}, {"role": "assistant", "content": "Yes"}]}, "chat"),
        ({"instruction": "Say {i}", "input": "loud", "output": "Yes"}, "completion"),
        ({"prompt": "Say {i}", "chosen": "Yes", "rejected": "No"}, "preference"),
        ({"prompt": "Say {i}", "completion": "Yes", "label": True}, "feedback"),
        ({"text": "Once upon {i} time"}, "text"),
    ],
)
def test_every_kind_is_written_so_that_it_is_read_again(row: dict[str, object], kind: str) -> None:
    lines = (json.dumps(row).replace("{i}", str(i)) for i in range(40))
    Path("rows.jsonl").write_text("\n".join(lines))
    (path,), _ = draft("rows.jsonl", "my-task")
    task = load_task(path)
    assert task.data.kind == kind
    assert len(read_data(task.data, task.seed).train) == 28


def test_comments_that_offer_settings_are_right() -> None:
    (path,), _ = draft(table(60), "task")
    lines = [line for line in path.read_text().splitlines() if line.lstrip().startswith("# learning_rate")]
    assert yaml.safe_load(lines[0].lstrip("# ")) == {"learning_rate": "2e-4"}
    load_task(path, ["train.learning_rate=2e-4", "train.early_stopping_patience=2"])


def test_nothing_is_overwritten_and_nothing_is_guessed(here: Path) -> None:
    draft(table(60), "task")
    with pytest.raises(ConfigError, match=r"already holds task\.yaml"):
        draft("film reviews.csv", "task")
    with pytest.raises(ConfigError, match=r"no file nothing\.csv"):
        draft("nothing.csv")
    with pytest.raises(ConfigError, match="names no file"):
        draft(" ")
    Path("odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="cannot tell what the columns hold"):
        draft("odd.csv")
    Path("empty.csv").write_text("text,label\n")
    with pytest.raises((ConfigError, DataError), match="holds no rows"):
        draft("empty.csv")
    assert not (here / "odd").exists()


def test_bad_rows_do_not_stop_it_and_are_told() -> None:
    Path("rows.jsonl").write_text(
        '{"text": "a", "label": "x"}\n{"text": 3, "label": "y"}\n{"text": "b", "label": "y"}\n'
    )
    _, notes = draft("rows.jsonl", "task")
    assert notes[-1].startswith("1 row cannot be used")


def test_the_command() -> None:
    done = CliRunner().invoke(cli, ["init", "--from", table(60), "my task", "--model", "Qwen/Qwen3-0.6B"])
    assert done.exit_code == 0
    assert "wrote my task/task.yaml" in done.stdout
    assert load_task("my task/task.yaml").model == "Qwen/Qwen3-0.6B"
    assert CliRunner().invoke(cli, ["init"]).exit_code == 2
    assert CliRunner().invoke(cli, ["init", "classify"]).exit_code == 2
    assert CliRunner().invoke(cli, ["init", "classify", "a", "--from", "b.csv"]).exit_code == 2
