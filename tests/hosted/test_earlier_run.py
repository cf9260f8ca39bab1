"""A hosted run taken up otherwise than it was agreed to, after its answers were lost, or without its state."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tunery
from tests.hosted.conftest import Watching
from tests.hosted.fake import MODEL, Failure, Fake
from tunery import api
from tunery.errors import CheckpointError, ConfigError, DataError, ResumableError, StoppedError

RUN = Path("runs/films")


def yes(sentences: Sequence[str]) -> bool:
    return True


def train(overrides: Sequence[str] = (), **more: Any) -> tunery.Run:
    return tunery.train("task.yaml", overrides, **{"progress": Watching(), "consent": yes, **more})


def stop_at(fake: Fake, method: str, path: str, skip: int = 0) -> None:
    """Break a run off there."""
    fake.failures.append(Failure(method, path, skip=skip, status=429, code="insufficient_quota"))
    with pytest.raises(ResumableError):
        train()


LONGER = "evaluate.max_new_tokens=2048"


def test_a_finished_run_is_asked_longer_answers_only_with_consent(project: Path, fake: Fake) -> None:
    train()
    with pytest.raises(ConfigError, match=r"8 questions to gpt-4\.1-mini[\s\S]*nobody could be asked"):
        train([LONGER], consent=None)
    assert len(fake.asked) == 16
    train([LONGER])
    assert len(fake.asked) == 32


@pytest.mark.parametrize("changed", [LONGER, "hosted.base_deployment=gpt-4o", "hosted.tuned_deployment=ft:other"])
@pytest.mark.parametrize(("method", "path", "skip"), [("GET", "/events", 0), ("POST", "/files", 1)], ids=str)
def test_what_is_asked_otherwise_when_a_run_goes_on_needs_consent_anew(
    project: Path, fake: Fake, changed: str, method: str, path: str, skip: int
) -> None:
    stop_at(fake, method, path, skip)
    with pytest.raises(ConfigError, match=r"8 questions[\s\S]*nobody could be asked"):
        train([changed], consent=None)
    assert fake.asked == []
    assert train(consent=None).evaluation is not None, "as it was agreed to"


def test_other_prices_need_consent_anew(project: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(fake, "POST", "/files")
    (project / "prices.toml").write_text(f'[models."{MODEL}"]\ntraining = 1000\n')
    monkeypatch.setenv("TUNERY_PRICES", str(project / "prices.toml"))
    with pytest.raises(ConfigError, match=r"\$1\.22[\s\S]*nobody could be asked"):
        train(consent=None)


def lose_the_answer(fake: Fake) -> None:
    """The job is made, and no answer tells of it."""
    made = Failure("POST", "/fine_tuning/jobs", skip=1, lose=True)
    fake.failures += [made, Failure("GET", "/fine_tuning/jobs$", times=1000, skip=1, status=500)]
    with pytest.raises(ResumableError, match="creating the job"):
        train()
    fake.failures.clear()


def test_a_job_whose_making_was_not_heard_of_is_cancelled(project: Path, fake: Fake) -> None:
    lose_the_answer(fake)
    (job,) = fake.jobs
    assert api.cancel("task.yaml", progress=Watching()) == f"{job} at {fake.address}: cancelled"
    assert fake.jobs[job]["status"] == "cancelled"


def test_nothing_is_cancelled_where_no_job_was_made(project: Path, fake: Fake) -> None:
    stop_at(fake, "POST", "/fine_tuning/jobs", 1)
    with pytest.raises(ConfigError, match="no job to cancel"):
        api.cancel("task.yaml", progress=Watching())


def test_an_interruption_while_the_job_is_made_says_that_there_may_be_one(project: Path, fake: Fake) -> None:
    whole = fake.add_job

    def interrupting(request: dict[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return whole(request)

    fake.add_job = interrupting  # type: ignore[method-assign]
    with pytest.raises(StoppedError, match="a job may have been made") as stopped:
        train()
    assert "finds a job that was made" in str(stopped.value)
    fake.add_job = whole  # type: ignore[method-assign]
    assert train().evaluation is not None
    assert len(fake.jobs) == 1


# --------------------------------------------------------------------------- by the job's name


def test_a_run_without_its_state_is_taken_up_by_its_job(project: Path, fake: Fake) -> None:
    stop_at(fake, "GET", "/events", 2)
    (job,) = fake.jobs
    fake.jobs[job]["model"] = f"{MODEL}-2025-04-14"
    (RUN / "hosted.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="--resume ftjob-"):
        train()
    run = train(resume=job)
    assert len(fake.jobs) == 1
    assert run.receipt["hosted"]["job"] == job
    assert run.receipt["training"]["steps"] == 8
    assert run.evaluation is not None
    assert json.loads((RUN / "hosted.json").read_text())["uploaded"]["training"]["id"] == "file-" + "1".zfill(24)
    requests = len(fake.requests)
    assert train(resume=job).receipt == run.receipt
    assert train().receipt == run.receipt
    assert len(fake.requests) == requests


def test_following_a_job_by_name_does_not_agree_to_its_questions(project: Path, fake: Fake) -> None:
    stop_at(fake, "GET", "/events")
    (job,) = fake.jobs
    (RUN / "hosted.json").unlink()
    with pytest.raises(ConfigError, match="8 questions"):
        train(resume=job, consent=None)


def test_a_job_of_another_task_is_not_taken_up(project: Path, fake: Fake) -> None:
    train()
    (job,) = fake.jobs
    with pytest.raises(ConfigError, match=r"the model: gpt-4\.1-mini, not gpt-4o-mini"):
        train(["model=openai:gpt-4o-mini", "name=other"], resume=job)
    with pytest.raises(ConfigError, match="the training rows; the validation rows"):
        train(["seed=5", "name=other"], resume=job)
    assert not Path("runs/other").exists()
    with pytest.raises(ConfigError, match="holds another run than that of ftjob-2"):
        train(resume="ftjob-2")


def test_what_is_known_of_a_failed_job_is_kept_aside_once_another_one_is_agreed_to(project: Path, fake: Fake) -> None:
    fake.statuses, fake.error = ("running", "failed"), {"code": "invalid_training_file", "message": "no", "param": ""}
    with pytest.raises(DataError):
        train()
    before = {name: (RUN / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl")}
    with pytest.raises(ConfigError, match="nobody could be asked"):
        train(consent=None)
    assert {name: (RUN / name).read_bytes() for name in before} == before
    fake.statuses = ("running", "running", "succeeded")
    train()
    assert {name: (RUN / "earlier-1" / name).read_bytes() for name in before} == before
    assert (RUN / "events.jsonl").read_bytes() != before["events.jsonl"]
