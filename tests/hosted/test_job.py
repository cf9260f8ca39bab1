"""A job's life: may it be made, files that arrive whole, one job and not two, each event once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.hosted.conftest import Said
from tests.hosted.fake import KEY, MODEL, Failure, Fake
from tunery.config_hosted import HostedConfig
from tunery.errors import ConfigError, HostedError
from tunery.hosted import client as client_module
from tunery.hosted.client import Service
from tunery.hosted.job import EventLog, Poller, cancel, create, require_access, retrieve, upload

ROWS = b'{"messages": []}\n' * 20_000
METHOD = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 2000}}}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file that does not fit into one packet."""
    (tmp_path / "training.jsonl").write_bytes(ROWS)
    return tmp_path / "training.jsonl"


def test_a_model_that_may_be_trained_leaves_nothing_behind(fake: Fake, service: Service) -> None:
    require_access(service, MODEL)
    assert fake.jobs == {}
    assert fake.files == {}
    assert fake.requests == ["POST /fine_tuning/jobs"]


def test_a_server_that_makes_a_job_without_rows_has_it_cancelled(fake: Fake, service: Service) -> None:
    fake.files["file-tuneryasksifitmaytrain"] = {}
    fake.content["file-tuneryasksifitmaytrain"] = b""
    require_access(service, MODEL)
    assert [job["status"] for job in fake.jobs.values()] == ["cancelled"]


def test_a_model_that_cannot_be_trained_there_is_named_with_those_that_are(fake: Fake, service: Service) -> None:
    with pytest.raises(HostedError, match=r"does not train gpt-4\.1-miny.*\n.*models there: gpt-4\.1-mini"):
        require_access(service, "gpt-4.1-miny")


@pytest.mark.parametrize("status", [400, 403])
def test_closed_training_is_told_before_anything_is_sent(fake: Fake, service: Service, status: int) -> None:
    fake.failures.append(Failure("POST", "/fine_tuning/jobs", status=status, code="training_not_available"))
    with pytest.raises(HostedError, match="2027-01-06"):
        require_access(service, MODEL)
    assert fake.files == {}


@pytest.mark.parametrize(
    "failure",
    [Failure("POST", "/files", drop=True), Failure("POST", "/files", status=500), Failure("POST", "/files", lose=True)],
    ids=["dropped while sending", "500", "answer lost"],
)
def test_a_file_arrives_whole_after_a_failure(fake: Fake, service: Service, rows: Path, failure: Failure) -> None:
    fake.failures.append(failure)
    sent = upload(service, rows)
    assert fake.content[sent["id"]] == ROWS
    assert fake.files[sent["id"]]["filename"] == "training.jsonl"
    assert fake.files[sent["id"]]["purpose"] == "fine-tune"
    assert fake.count("POST /files") == 2


def test_a_file_of_another_size_is_not_taken(fake: Fake, service: Service, rows: Path) -> None:
    whole = fake.add_file
    fake.add_file = lambda name, content, purpose="": {**whole(name, content, purpose), "bytes": 7}  # type: ignore[method-assign]
    with pytest.raises(HostedError, match="340,000 bytes were sent and 7 arrived"):
        upload(service, rows)


@pytest.mark.parametrize("failure", [{"lose": True}, {"drop": True}, {"status": 500}, {"status": 429}], ids=str)
def test_a_job_is_made_once_whatever_happens_to_the_answer(
    fake: Fake, service: Service, rows: Path, failure: dict[str, object]
) -> None:
    file = upload(service, rows)["id"]
    fake.failures.append(Failure("POST", "/fine_tuning/jobs", **failure))  # type: ignore[arg-type]
    job = create(service, {"model": MODEL, "training_file": file, "suffix": "x"})
    assert list(fake.jobs) == [job["id"]]
    assert job["training_file"] == file


def test_a_job_that_is_made_after_the_time_is_up_is_the_only_one(
    fake: Fake, service: Service, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = upload(service, rows)["id"]
    monkeypatch.setattr(client_module, "LONG_TIMEOUT", 0.3)
    monkeypatch.setattr(client_module, "sleep", lambda seconds: time.sleep(0.2 * seconds))
    fake.failures.append(Failure("POST", "/fine_tuning/jobs", hang=0.8, late=True))
    job = create(service, {"model": MODEL, "training_file": file})
    assert list(fake.jobs) == [job["id"]]
    assert fake.count("POST /fine_tuning/jobs$") == 1


def test_of_two_jobs_on_the_same_rows_the_later_is_cancelled(
    fake: Fake, service: Service, rows: Path, notes: Said
) -> None:
    file = upload(service, rows)["id"]
    once = fake.add_job
    fake.add_job = lambda request: [once(request), once(request)][1]  # type: ignore[method-assign]
    job = create(service, {"model": MODEL, "training_file": file})
    live = [one["id"] for one in fake.jobs.values() if one["status"] != "cancelled"]
    assert (live, len(fake.jobs)) == ([job["id"]], 2)
    assert "is cancelled: it is the same job as" in notes[-1]


def test_making_a_job_may_take_long(fake: Fake, service: Service, rows: Path) -> None:
    given: list[object] = []
    whole = fake.add_job

    def slow(request: dict[str, object]) -> dict[str, object]:
        time.sleep(0.5)
        return whole(request)

    fake.add_job = slow  # type: ignore[method-assign]
    file = upload(service, rows)["id"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "TIMEOUT", 0.3)
        job = create(Service(HostedConfig(), given.append), {"model": MODEL, "training_file": file})
    assert list(fake.jobs) == [job["id"]]
    assert given == []


def test_a_wrong_key_is_told_without_it(fake: Fake, notes: Said, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}x")
    with pytest.raises(ConfigError, match="refuses the key") as stopped:
        upload(Service(HostedConfig(), notes.append), rows)
    assert KEY not in str(stopped.value)


def test_events_come_once_each_in_their_order_also_after_a_break(
    fake: Fake, service: Service, rows: Path, tmp_path: Path
) -> None:
    job = create(service, {"model": MODEL, "training_file": upload(service, rows)["id"], "method": METHOD})["id"]
    log = EventLog(tmp_path / "events.jsonl")
    for _ in range(3):
        retrieve(service, job)
    seen = log.fetch(service, job)
    assert len(seen) > 5, "more than a page"
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"id": "cut sho')  # a crash
    again = EventLog(tmp_path / "events.jsonl")
    assert again.events == seen
    assert again.fetch(service, job) == []
    retrieve(service, job)
    again.fetch(service, job)
    known = [event["id"] for event in EventLog(tmp_path / "events.jsonl").events]
    assert known == [event["id"] for event in fake.events[job]]


def test_following_is_patient_with_a_server_that_goes_away(
    fake: Fake, service: Service, rows: Path, tmp_path: Path, pauses: list[float]
) -> None:
    job = create(service, {"model": MODEL, "training_file": upload(service, rows)["id"], "method": METHOD})["id"]
    fake.failures += [Failure("GET", f"/{job}$", times=5, drop=True), Failure("GET", "/events", times=3, status=502)]
    told: list[str] = []
    statuses: list[str] = []
    log = EventLog(tmp_path / "events.jsonl")
    poller = Poller(service, log, lambda e: told.append(e["id"]), lambda j: statuses.append(j["status"]))
    done = poller.poll(job)
    assert done["status"] == "succeeded"
    assert statuses == ["validating_files", "queued", "running", "succeeded"]
    assert told == [event["id"] for event in fake.events[job]]


def test_a_job_can_be_cancelled(fake: Fake, service: Service, rows: Path) -> None:
    job = create(service, {"model": MODEL, "training_file": upload(service, rows)["id"], "method": METHOD})["id"]
    assert cancel(service, job)["status"] == "cancelled"
