"""The command line as a person meets it: messages, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny_llama


def tunery(
    *arguments: str, cwd: Path, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunery.cli", *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=120,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"film {i}", "label": "good" if i % 2 else "bad"}) + "\n" for i in range(24))
    )
    (tmp_path / "task.yaml").write_text(
        "name: films\nmodel: ./base\ndata:\n  train: rows.jsonl\ntrain:\n  max_steps: 3\n  batch_size: 4\n"
    )
    return tmp_path


def test_help_and_version_need_no_torch(tmp_path: Path) -> None:
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import sys\nfor name in ('torch', 'transformers', 'numpy', 'pydantic'):\n    sys.modules[name] = None\n"
    )
    for arguments in (["--help"], ["--version"], ["train", "--help"]):
        done = tunery(*arguments, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        assert "tunery" in done.stdout


def test_help_imports_nothing_but_click(tmp_path: Path) -> None:
    """What makes it quick (half a second is the promise); how long it takes says more about the machine."""
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from tunery.cli import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(loaded - set(sys.stdlib_module_names)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "tunery train" in done.stdout
    assert set(done.stderr.split()) <= {"click", "tunery", "colorama"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "nowhere.yaml"], 2, ["no task file at nowhere.yaml", "tunery init"]),
        (["train", "task.yaml", "--set", "lora.rnak=8"], 2, ["lora.rnak", "did you mean lora.rank?"]),
        (["train", "task.yaml", "--set", "train.batch_size=none"], 2, ["train.batch_size", "integer"]),
        (["train", "task.yaml", "--set", "data.train=rowz.jsonl"], 2, ["rowz.jsonl", "rows.jsonl"]),
        (["train", "task.yaml", "--set", "lora.targets=q_prj"], 2, ["q_prj", "did you mean q_proj"]),
        (["train", "task.yaml", "--set", "model=smollm2-135m-instuct"], 2, ["smollm2-135m-instruct"]),
        (["eval", "runs/nothing"], 2, ["runs/nothing", "tunery train"]),
        (["init", "clasify", "x"], 2, ["classify"]),
        (["trian"], 2, ["trian"]),
    ],
)
def test_a_mistake_gives_one_clear_message_and_its_code(
    project: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    done = tunery(*arguments, cwd=project)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (project / "runs").exists() or not list((project / "runs").glob("*/*"))


def test_a_misspelt_setting_in_the_file_names_its_line(project: Path) -> None:
    (project / "task.yaml").write_text("model: ./base\ndata:\n  train: rows.jsonl\nlora:\n  rank: 4\n  aplha: 3\n")
    done = tunery("check", "task.yaml", cwd=project)
    assert done.returncode == 2
    assert "task.yaml:6:lora.aplha: unknown setting; did you mean lora.alpha?" in done.stderr


def test_bad_rows_are_listed_with_file_line_and_field(project: Path) -> None:
    with open(project / "rows.jsonl", "a") as file:
        file.write('{"text": "no label"}\n{"text": 3, "label": "good"}\n{broken\n')
    done = tunery("check", "task.yaml", cwd=project)
    assert done.returncode == 3
    assert "rows.jsonl:25:label" in done.stderr
    assert "rows.jsonl:26:text" in done.stderr
    assert "rows.jsonl:27" in done.stderr
    assert "data.on_bad_row: skip" in done.stderr
    skipping = tunery("check", "task.yaml", "--set", "data.on_bad_row=skip", "--json", cwd=project)
    assert skipping.returncode == 0
    assert json.loads(skipping.stdout)["data"]["rows_skipped"] == 3


def test_check_shows_the_rows_with_what_is_trained_marked(project: Path) -> None:
    done = tunery("check", "task.yaml", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "⟦good<|im_end|>⟧" in done.stdout or "⟦bad<|im_end|>⟧" in done.stdout
    assert "end-of-turn token <|im_end|> is trained" in done.stdout


def test_train_prints_results_on_stdout_and_progress_on_stderr(project: Path) -> None:
    done = tunery("train", "task.yaml", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stderr
    assert "step 3/3" not in done.stdout
    for words in ("base", "tuned", "accuracy", "Receipt", "tensors moved", "runs/films/report.html"):
        assert words in done.stdout
    for bad_news in (
        "With this few rows, a difference could be chance (95 % intervals: base ",
        "2 held-out rows only",
        "every time would be right 50.0% of the time",
        "12 trained of 22, 2 for validation",
        "2 validation rows are held out: a share measured on so few is uncertain",
    ):
        assert bad_news in done.stdout
    again = tunery("train", "task.yaml", "--json", "--quiet", cwd=project)
    assert again.stderr == ""
    assert json.loads(again.stdout)["receipt"]["training"]["steps"] == 3
    chat = tunery("chat", "runs/films", "--max-new-tokens", "3", cwd=project, stdin="film 3\n/both\nfilm 4\n/quit\n")
    assert chat.returncode == 0, chat.stderr
    assert "[base]" in chat.stdout
    assert "[tuned]" in chat.stdout
    evaluated = tunery("eval", "runs/films", "--json", "--quiet", cwd=project)
    assert json.loads(evaluated.stdout)["rows"] > 0


def test_a_model_and_rows_need_no_task_file(project: Path) -> None:
    chosen = ["--model", "base", "--data", "rows.jsonl", "--set", "train.max_steps=3", "--set", "train.batch_size=4"]
    checked = tunery("check", *chosen, "--json", cwd=project)
    assert json.loads(checked.stdout)["training"]["steps"] == 3
    done = tunery("train", *chosen, "--quiet", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "runs/rows"
    same = tunery("train", "runs/rows/task.yaml", cwd=project)
    assert same.returncode == 0, same.stderr
    assert "already finished" in same.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no task is named", "--model MODEL --data FILE"]),
        (["--model", "base"], ["data: this setting is needed", "tunery settings data"]),
        (["--data", "rows.jsonl"], ["model: this setting is needed", "tunery settings model"]),
        (["--model", "base", "--data", "rowz.jsonl"], ["rowz.jsonl", "did you mean rows.jsonl"]),
        (["rows.csv"], ["rows.csv:1", "tunery train --model MODEL --data rows.csv"]),
    ],
)
def test_what_is_missing_without_a_task_file_is_named(project: Path, arguments: list[str], words: list[str]) -> None:
    (project / "rows.csv").write_text("text,label\na,b\n")
    done = tunery("check", *arguments, cwd=project)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr


def test_predictions_go_to_stdout_and_notes_to_stderr(project: Path) -> None:
    assert tunery("train", "task.yaml", "--quiet", cwd=project).returncode == 0
    asked = ["predict", "runs/films", "--data", "-", "--out", "-"]
    done = tunery(*asked, cwd=project, stdin='{"text": "film 3", "id": 7}\n')
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["id"] == 7
    assert row["prediction"] in ("good", "bad")
    assert tunery(*asked, "--json", cwd=project, stdin="{}").returncode == 2
    bad = tunery(*asked, cwd=project, stdin='{"txet": "film 3"}\n')
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert "standard input has no column 'text'" in bad.stderr


def test_runs_list_by_default_and_prune_only_when_told(project: Path) -> None:
    assert tunery("train", "task.yaml", "--quiet", cwd=project).returncode == 0
    for arguments in (["runs"], ["runs", "runs"], ["runs", "list"]):
        done = tunery(*arguments, cwd=project)
        assert done.returncode == 0, done.stderr
        assert "films" in done.stdout
        assert "1 run, " in done.stdout
    (run,) = json.loads(tunery("runs", "--json", cwd=project).stdout)
    assert run["checkpoint_bytes"] > 0
    for arguments in ([], ["--dry-run", "--yes"]):
        done = tunery("runs", "prune", *arguments, cwd=project)
        assert "nothing was removed" in done.stdout
        assert (project / "runs" / "films" / "checkpoints").is_dir()
    done = tunery("runs", "prune", "--yes", "--json", cwd=project)
    assert json.loads(done.stdout)["bytes"] == run["checkpoint_bytes"]
    assert not (project / "runs" / "films" / "checkpoints").exists()


def test_seed_is_short_for_the_setting(project: Path) -> None:
    done = tunery("train", "task.yaml", "--seed", "7", "--quiet", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["receipt"]["training"]["seed"] == 7


def test_a_range_test_draws_a_curve_and_suggests_a_rate(project: Path) -> None:
    done = tunery("check", "task.yaml", "--lr-test", "--lr-steps", "12", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "--set train.learning_rate=" in done.stdout
    assert "●" in done.stdout
    assert not (project / "runs").exists()
