"""Moving house where something is odd: files that are gone or the same, answers that are missing, changed settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosted.conftest import Watching, write_chats
from tests.hosted.fake import Failure, Fake
from tests.hosted.test_migrate import QUICK, base, job, move
from tunery.errors import ConfigError, DataError, HostedError, ModelError
from tunery.hosted.capture import open_capture
from tunery.moving import migrate

__all__ = ["base", "job"]  # fixtures

CAPTURE = Path("moved") / "capture"


def warnings(done: Any) -> str:
    return " ".join(done.result["warnings"])


# --------------------------------------------------------------------------- what was learnt


def test_the_page_tells_the_settings_that_were_used(job: str, base: Path) -> None:
    move(job, None, capture_only=True)
    settings = ["train.learning_rate_multiplier=0.5", "seed=3", "data.validation=0.25"]
    done = move("moved", base, overrides=[*QUICK, *settings])
    assert done.run is not None
    assert done.result is not None
    here = {what: (theirs, ours) for what, theirs, ours in done.result["mapping"]}
    assert here["Epochs"] == ("2", "2 steps")
    assert here["Batch size"] == ("8", "4")
    assert here["Learning-rate multiplier"] == ("1.8", "0.5")
    assert here["Seed"] == ("7", "3")
    assert here["Held-out rows"] == ("validation.jsonl", "25% of the rows")


def test_a_row_that_is_in_both_files_was_learnt_by_the_hosted_model(job: str, fake: Fake, base: Path) -> None:
    file = fake.jobs[job]["training_file"]
    fake.content[file] += write_chats(Path("more.jsonl"), range(100, 105)).read_bytes()
    done = move(job, base)
    assert "5 of the 12 questions are rows that the hosted model learnt" in warnings(done)
    assert "the local model learnt" not in warnings(done)


def test_one_file_for_training_and_validation_is_asked_all_the_same(job: str, fake: Fake, base: Path) -> None:
    fake.jobs[job]["validation_file"] = fake.jobs[job]["training_file"]
    progress = Watching()
    done = move(job, None, progress, capture_only=True, rows=15)
    assert done.answers == 15
    assert "only the validation rows are asked" in " ".join(progress.said)
    with pytest.raises(DataError, match="every training row"):
        move("moved", base)
    done = move("moved", base, overrides=[*QUICK, "data.validation=0.1"])
    assert "15 of the 15 questions are rows that the hosted model learnt" in warnings(done)
    assert "that the local model learnt" in warnings(done)


@pytest.mark.parametrize("setting", ["seed=8", "data.validation=null"])
def test_rows_that_the_run_learnt_by_its_own_settings_are_told(job: str, fake: Fake, base: Path, setting: str) -> None:
    fake.jobs[job]["validation_file"] = None
    done = move(job, base, overrides=[*QUICK, "evaluate.enabled=false", setting])
    assert "questions are rows that the local model learnt" in warnings(done)


# --------------------------------------------------------------------------- answers that are missing


def test_saving_everything_fails_where_the_answers_could_not_be_had(job: str, fake: Fake) -> None:
    fake.failures.append(Failure("POST", "/chat", skip=4, times=100, status=404))
    with pytest.raises(HostedError, match=r"[45] of 12 answers are kept in .*capture, with all the rest") as stopped:
        move(job, None, capture_only=True)
    assert stopped.value.exit_code == 69
    assert (CAPTURE / "manifest.json").exists()


def test_saving_everything_fails_while_there_is_no_model_yet(job: str, fake: Fake) -> None:
    fake.jobs[job] |= {"fine_tuned_model": None}
    fake.statuses = ("running",)
    with pytest.raises(HostedError, match="has made no model yet"):
        move(job, None, capture_only=True)


def test_nothing_is_trained_while_answers_can_still_be_had(job: str, fake: Fake, base: Path) -> None:
    fake.failures.append(Failure("POST", "/chat", skip=4, status=403, message="missing scope"))
    with pytest.raises(HostedError, match="could not be asked"):
        move(job, base)
    assert not (Path("moved") / "base").exists()
    progress = Watching()
    done = move("moved", base, progress)
    assert done.result is not None
    assert done.result["rows"] < 12
    assert any("questions have no answer of the tuned model" in said for said in progress.said)


def test_a_base_is_looked_for_before_anything_is_asked(job: str, fake: Fake, base: Path) -> None:
    for to, words in (("openai:gpt-4.1", "is a hosted model"), ("no-such-model", "no built-in model")):
        with pytest.raises(ModelError, match=words):
            migrate(job, to, out="moved", progress=Watching(), consent=lambda _: True)
    assert fake.requests == []
    with pytest.raises(ConfigError, match="epochs"):
        move(job, base, overrides=["train.epochs=-1"])
    assert fake.asked == []


# --------------------------------------------------------------------------- files


def test_a_capture_goes_on_without_files_that_are_gone(job: str, fake: Fake) -> None:
    del fake.content[fake.jobs[job]["validation_file"]]
    fake.jobs[job]["result_files"] = ["file-gone", *fake.jobs[job]["result_files"]]
    fake.failures.append(Failure("GET", "/events", status=404))
    progress = Watching()
    assert move(job, None, progress, capture_only=True).answers == 4, "a tenth of the training rows"
    said = "\n".join(progress.said)
    assert "left out: validation.jsonl cannot be fetched" in said
    assert "--validation FILE.jsonl" in said
    assert (CAPTURE / "results.csv").exists()
    assert move(job, None, capture_only=True, files={"validation": "validation.jsonl"}).answers == 16


def test_own_files_may_be_those_of_the_capture(job: str) -> None:
    move(job, None, capture_only=True)
    move(job, None, capture_only=True, files={"training": CAPTURE / "training.jsonl"})


def test_a_capture_may_be_the_current_folder(job: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move(job, None, capture_only=True)
    monkeypatch.chdir(CAPTURE)
    assert migrate(".", str(base), overrides=QUICK, progress=Watching()).result is not None
    task = yaml.safe_load(Path("../base.yaml").read_text())
    assert task["data"]["train"] == "capture/training.jsonl"
    assert Path("../base/side-by-side.html").exists()


def test_what_a_changed_capture_is_told_to_do_can_be_done(job: str) -> None:
    move(job, None, capture_only=True)
    shutil.copy(CAPTURE / "training.jsonl", CAPTURE / "validation.jsonl")
    with pytest.raises(Exception, match="for other rows, name the job and give them with --files and --out NEW_FOLDER"):
        open_capture(CAPTURE)


def test_own_answers_may_hold_any_character_but_must_be_utf_8(job: str, base: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "film 100\u2028is\x85dull"}, {"role": "assistant", "content": "bad"}]
    }
    Path("own.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    move(job, None, capture_only=True)
    done = move("moved", base, answers=Path("own.jsonl"))
    assert done.result is not None
    assert done.result["rows"] == 1
    Path("own.jsonl").write_text(json.dumps(row), encoding="utf-16")
    with pytest.raises(DataError, match=r"own\.jsonl is not UTF-8 text"):
        move("moved", base, answers=Path("own.jsonl"))


def test_a_second_is_that_of_one_answer_alone(job: str, base: Path) -> None:
    done = move(job, base)
    assert done.result is not None
    speed = done.result["speed"]
    assert speed["local_seconds"] > 0
    assert done.run is not None
    assert "Seconds for one answer, here" in (done.run.path / "side-by-side.html").read_text()
