"""Moving house: everything captured while it lives, a model trained here on it, and both side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import tunery
from tests.hosted.conftest import Watching, film, write_chats
from tests.hosted.fake import KEY, MODEL, Failure, Fake
from tests.tiny import save_tiny_llama
from tunery.config_hosted import HostedConfig
from tunery.errors import CheckpointError, ConfigError, DataError, HostedError, ResumableError
from tunery.hosted.client import Service
from tunery.hosted.job import create, retrieve
from tunery.hosted.migrate import Migration
from tunery.moving import migrate

QUICK = ["train.max_steps=2", "train.batch_size=4", "train.precision=float32", "evaluate.max_new_tokens=4"]


def yes(sentences: Sequence[str]) -> bool:
    return True


def move(source: str | None, to: Path | None, progress: Watching | None = None, **more: Any) -> Migration:
    settings = {"consent": yes, "overrides": QUICK, **more}
    return migrate(source, None if to is None else str(to), out="moved", progress=progress or Watching(), **settings)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model to move to."""
    return save_tiny_llama(tmp_path / "base")


@pytest.fixture
def job(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A finished job on the stand-in: 40 conversations, 12 for validation."""
    monkeypatch.chdir(tmp_path)
    files = {
        name: fake.add_file(f"{name}.jsonl", write_chats(tmp_path / f"{name}.jsonl", numbers).read_bytes())["id"]
        for name, numbers in (("training", range(40)), ("validation", range(100, 112)))
    }
    request = {
        "model": MODEL,
        "training_file": files["training"],
        "validation_file": files["validation"],
        "seed": 7,
        "suffix": "films",
        "metadata": {"team": "films"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
    }
    service = Service(HostedConfig(), lambda _: None)
    number = create(service, request)["id"]
    while retrieve(service, number)["status"] != "succeeded":
        pass
    fake.requests.clear()
    return number


def captured(name: str) -> Any:
    return json.loads((Path("moved") / "capture" / name).read_text())


def test_a_job_is_captured_trained_here_and_put_side_by_side(job: str, fake: Fake, base: Path) -> None:
    done = move(job, base)
    folder = Path("moved")
    assert captured("job.json")["fine_tuned_model"].startswith("ft:")
    assert (folder / "capture" / "training.jsonl").read_bytes() == Path("training.jsonl").read_bytes()
    assert (folder / "capture" / "validation.jsonl").read_bytes() == Path("validation.jsonl").read_bytes()
    answers = [json.loads(line) for line in (folder / "capture" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 12
    assert {answer["answer"] for answer in answers} == {"good", "bad"}
    assert all(answer["answer"] == answer["reference"] for answer in answers)
    assert answers[0]["logprobs"]
    assert (folder / "capture" / "results.csv").exists()
    assert (folder / "capture" / "events.jsonl").exists()
    assert done.run is not None
    result = json.loads((done.run.path / "side-by-side.json").read_text())
    assert done.result == result
    assert result["rows"] == result["with_reference"] == 12
    assert result["labels"] == ["bad", "good"]
    assert result["hosted"]["accuracy"] == 1.0
    assert 0 <= result["local"]["accuracy"] <= 1
    assert result["agreement"]["label"]["share"] == result["local"]["accuracy"], "the hosted model is always right"
    assert sum(map(sum, result["between"]["counts"])) == 12
    assert result["certainty"][0]["rows"] == 12
    assert result["from"]["hyperparameters"]["n_epochs"] == 2
    assert result["from"]["metadata"] == {"team": "films"}
    assert result["to"]["adapter_bytes"] > 0
    assert result["speed"]["hosted_seconds"] > 0


def test_the_task_has_the_settings_of_the_job(job: str, base: Path) -> None:
    move(job, base)
    task = yaml.safe_load((Path("moved") / "base.yaml").read_text())
    assert task["train"] == {"epochs": 2, "batch_size": 8, "learning_rate_multiplier": 1.8}
    assert task["seed"] == 7
    assert task["data"] == {"train": "capture/training.jsonl", "validation": "capture/validation.jsonl", "kind": "chat"}
    loaded = tunery.load_task(Path("moved") / "base.yaml")
    assert loaded.data.train == str((Path("moved") / "capture" / "training.jsonl").resolve())
    assert loaded.run_dir == Path("moved") / "base"


def test_the_page_shows_both_and_loads_nothing(job: str, base: Path) -> None:
    done = move(job, base)
    assert done.run is not None
    page = (done.run.path / "side-by-side.html").read_text()
    for words in ("of 12 questions", "Same label", "Hosted", "Local", "film 1", "Adapter file", "multiplier", job):
        assert words in page
    assert not re.search(r'(src|href)="https?:', page)
    assert "<script" not in page


def test_everything_is_saved_now_and_trained_later_without_the_server(job: str, fake: Fake, base: Path) -> None:
    progress = Watching()
    done = move(job, None, progress, capture_only=True)
    assert (done.run, done.answers) == (None, 12)
    fake.failures += [Failure(method, "", times=1000, status=410) for method in ("GET", "POST")]
    later = move("moved", base)
    assert later.run is not None
    assert later.result is not None
    assert later.result["rows"] == 12
    again = move("moved/capture", base)
    assert again.result is not None
    assert again.result["agreement"] == later.result["agreement"]


def test_questions_are_put_only_with_consent_and_no_more_than_asked_for(job: str, fake: Fake) -> None:
    shown: list[str] = []

    def no(sentences: Sequence[str]) -> bool:
        shown.extend(sentences)
        return False

    with pytest.raises(ConfigError, match="nothing was sent"):
        move(job, None, capture_only=True, consent=no, rows=5)
    assert "5 questions to ft:" in shown[0]
    assert fake.asked == []
    assert captured("job.json")["id"] == job, "what costs nothing is there already"
    move(job, None, capture_only=True, rows=5)
    assert len(fake.asked) == 5
    move(job, None, capture_only=True)
    assert len(fake.asked) == 12, "those that were missing"


def test_a_capture_that_broke_off_goes_on(job: str, fake: Fake) -> None:
    fake.failures.append(Failure("POST", "/chat", skip=4, status=429, code="insufficient_quota"))
    with pytest.raises(ResumableError):
        move(job, None, capture_only=True)
    kept = len((Path("moved") / "capture" / "answers.jsonl").read_text().splitlines())
    assert kept >= 4
    fetched = fake.count("/content")
    move(job, None, capture_only=True)
    assert len(fake.asked) == 12
    assert fake.count("/content") - fetched == 1, "only the result file; the rows lie there whole"


def test_a_model_is_found_by_its_own_name(job: str, fake: Fake) -> None:
    name = fake.jobs[job]["fine_tuned_model"]
    assert move(name, None, capture_only=True).answers == 12
    with pytest.raises(HostedError, match="no job of this account"):
        migrate("ft:gpt-4.1:other::1", out="other", capture_only=True, progress=Watching(), consent=yes)


def test_a_model_that_is_gone_leaves_the_rest(job: str, fake: Fake, base: Path) -> None:
    fake.gone = (fake.jobs[job]["fine_tuned_model"],)
    progress = Watching()
    done = move(job, base, progress)
    assert done.answers == 0
    assert done.run is not None
    assert done.result is None
    said = " ".join(progress.said)
    assert "does not answer any more" in said
    assert "0 of 12 answers are kept" in said
    assert said.index("there will be nothing to put side by side") < said.index("step "), "before the training"


def test_a_file_that_is_gone_can_be_given(job: str, fake: Fake) -> None:
    del fake.content[fake.jobs[job]["training_file"]]
    with pytest.raises(HostedError, match=r"training\.jsonl cannot be fetched[\s\S]*--files FILE\.jsonl"):
        move(job, None, capture_only=True)
    assert move(job, None, capture_only=True, files={"training": "training.jsonl"}).answers == 12


def test_without_a_validation_file_rows_are_held_out_and_the_page_says_so(job: str, fake: Fake, base: Path) -> None:
    fake.jobs[job]["validation_file"] = None
    done = move(job, base)
    assert done.result is not None
    assert done.result["rows"] == 4, "a tenth"
    assert any("4 of the 4 questions are rows that the hosted model learnt" in w for w in done.result["warnings"])
    assert not any("the local model learnt" in warning for warning in done.result["warnings"])


def test_files_do_where_the_account_is_closed(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        name: write_chats(tmp_path / f"{name}.jsonl", range(*span))
        for name, span in (("training", (0, 20)), ("validation", (50, 58)), ("kept", (50, 60)))
    }
    kept = files.pop("kept")
    done = move(None, base, files=files, answers=kept)
    assert done.result is not None
    assert done.result["rows"] == 10
    assert done.result["with_reference"] == 8, "two questions are no rows of ours"
    assert done.result["hosted"]["exact"] == 1.0
    task = yaml.safe_load((Path("moved") / "base.yaml").read_text())
    assert task["train"] == {"epochs": 3}
    with pytest.raises(ConfigError, match="which model"):
        move(None, None, files=files)
    with pytest.raises(ConfigError, match="what is to be moved"):
        move(None, base)
    with pytest.raises(ConfigError, match="holds no captured job"):
        migrate(str(tmp_path), str(base), progress=Watching())


def test_rows_that_cannot_be_read_are_saved_all_the_same(job: str, fake: Fake) -> None:
    file = fake.jobs[job]["training_file"]
    fake.content[file] = b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n' * 12
    fake.jobs[job]["validation_file"] = None
    with pytest.raises(HostedError, match=r"the rows are saved in .* could not be read, so the model was not asked"):
        move(job, None, capture_only=True)
    assert (Path("moved") / "capture" / "training.jsonl").read_bytes() == fake.content[file]


def test_answers_of_a_persons_own_do_not_take_the_place_of_captured_ones(job: str, base: Path) -> None:
    move(job, None, capture_only=True)
    captured_before = (Path("moved") / "capture" / "answers.jsonl").read_bytes()
    own = write_chats(Path("own.jsonl"), range(100, 103))
    done = move("moved", base, answers=own)
    assert done.result is not None
    assert done.result["rows"] == 3
    kept = [path.read_bytes() for path in (Path("moved") / "capture").glob("answers-*.jsonl")]
    assert kept == [captured_before]


def test_answers_that_are_none_are_named(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"training": write_chats(tmp_path / "training.jsonl", range(20))}
    (tmp_path / "answers.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{broken\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:1: neither a conversation[\s\S]*answers\.jsonl:2"):
        move(None, base, files=files, answers=tmp_path / "answers.jsonl")


def test_a_capture_that_was_changed_is_refused(job: str, base: Path) -> None:
    move(job, None, capture_only=True)
    path = Path("moved") / "capture" / "training.jsonl"
    path.write_text(path.read_text().replace("dull", "grey"))
    with pytest.raises(CheckpointError, match=r"training\.jsonl is not as captured"):
        move("moved", base)
    move(job, None, capture_only=True)
    assert "dull" in path.read_text(), "fetched again"
    (Path("moved") / "capture" / "job.json").write_text(json.dumps({"id": "ftjob-another"}))
    with pytest.raises(ConfigError, match="holds ftjob-another"):
        move(job, None, capture_only=True)


def test_a_job_of_pairs_is_moved(fake: Fake, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("pairs.jsonl", "w") as file:
        for number in range(20):
            text, label = film(number)
            row = {"input": {"messages": [{"role": "user", "content": text}]}}
            for name, answer in (("preferred_output", label), ("non_preferred_output", "hm")):
                row[name] = [{"role": "assistant", "content": answer}]  # type: ignore[assignment]
            file.write(json.dumps(row) + "\n")
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1, "batch_size": 4}}}
    file_id = fake.add_file("pairs.jsonl", Path("pairs.jsonl").read_bytes())["id"]
    service = Service(HostedConfig(), lambda _: None)
    number = create(service, {"model": MODEL, "training_file": file_id, "method": method})["id"]
    while retrieve(service, number)["status"] != "succeeded":
        pass
    done = move(number, base)
    task = yaml.safe_load((Path("moved") / "base.yaml").read_text())
    assert (task["data"]["kind"], task["train"]["beta"]) == ("preference", 0.2)
    assert done.result is not None
    assert done.result["rows"] == 2


def test_the_key_is_written_nowhere(job: str, base: Path) -> None:
    progress = Watching()
    move(job, base, progress)
    for path in Path("moved").rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "\n".join(progress.said)
