"""The store: nothing is lost, pages are stable, and a job's status has one writer at a time."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tunery.errors import ConfigError
from tunery.serve.records import FINAL, TRANSITIONS, Event, File, Job, JobError, derived_id, new_id
from tunery.serve.store import Store, UnknownRecordError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "server.sqlite3")


def job(number: int, **fields: Any) -> Job:
    return Job(f"ftjob-{number}", 1000 + number, "base", 7, "file-a", **fields)


def file(number: int, **fields: Any) -> File:
    return File(f"file-{number}", 10, 1000, f"{number}.jsonl", "fine-tune", **fields)


def ids(page: Any) -> list[str]:
    return [record.id for record in page.data]


def test_a_record_comes_back_as_it_was_also_from_another_process(store: Store) -> None:
    failed = job(
        1,
        hyperparameters={"n_epochs": 3},
        metadata={"team": "ö ' \" %"},
        error=JobError("invalid_training_file", "Example 3", "training_file"),
        integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": []}}],
    )
    store.add(failed)
    store.close()
    again = Store(store.path)
    assert again.get(Job, "ftjob-1") == failed
    assert again.get(Job, "ftjob-2") is None
    assert again.get(File, "ftjob-1") is None


def test_pages_follow_each_other_while_records_come_and_go(store: Store) -> None:
    for number in range(7):
        store.add(file(number))
    first = store.list(File, limit=3)
    assert (ids(first), first.has_more) == (["file-6", "file-5", "file-4"], True)
    assert (first.first_id, first.last_id) == ("file-6", "file-4")
    store.add(file(7))  # newer than all pages: no page shifts
    for number in (6, 5, 4):
        store.delete(File, f"file-{number}")
    second = store.list(File, after=first.last_id, limit=3)  # the record it begins after is gone
    assert (ids(second), second.has_more) == (["file-3", "file-2", "file-1"], True)
    third = store.list(File, after=second.last_id, limit=3)
    assert (ids(third), third.has_more) == (["file-0"], False)
    assert ids(store.list(File, order="asc", after="file-2", limit=9)) == ["file-3", "file-7"]
    assert store.list(File, after="file-7", order="asc").last_id is None
    with pytest.raises(UnknownRecordError):
        store.list(File, after="file-99")


def test_an_id_is_used_once_and_a_second_record_under_it_changes_nothing(store: Store) -> None:
    assert store.add(file(1)) is True
    assert store.add(File("file-1", 99, 1, "other", "fine-tune")) is False
    assert store.get(File, "file-1") == file(1)
    assert store.delete(File, "file-1") is True
    assert store.delete(File, "file-1") is False
    assert store.add(file(1)) is False
    assert store.get(File, "file-1") is None


def test_lists_take_only_what_is_asked_for(store: Store) -> None:
    store.add(job(1, metadata={"team": "a", "run": "1"}))
    store.add(job(2, metadata={"team": "a"}))
    store.add(job(3, metadata={"$.team": "a"}))
    store.add(job(4))
    assert ids(store.list(Job, metadata={"team": "a"})) == ["ftjob-2", "ftjob-1"]
    assert ids(store.list(Job, metadata={"team": "a", "run": "1"})) == ["ftjob-1"]
    assert ids(store.list(Job, metadata={"$.team": "a"})) == ["ftjob-3"]
    assert ids(store.list(Job, metadata={"team": "' OR 1=1 --"})) == []
    store.move("ftjob-2", "queued", expected={"validating_files"})
    assert ids(store.list(Job, where={"status": "queued"})) == ["ftjob-2"]
    assert ids(store.list(Job, where={"status": ("queued", "validating_files")}, order="asc", limit=2)) == [
        "ftjob-1",
        "ftjob-2",
    ]
    for owner in ("ftjob-1", "ftjob-2"):
        store.add(Event(f"ftevent-{owner}", 1, "hello"), owner=owner)
    assert ids(store.list(Event, owner="ftjob-2")) == ["ftevent-ftjob-2"]
    assert store.owner(Event, "ftevent-ftjob-2") == "ftjob-2"


def test_of_many_threads_that_move_a_job_one_does(store: Store) -> None:
    store.add(job(1))
    store.move("ftjob-1", "queued", expected={"validating_files"})
    won: list[str] = []
    barrier = threading.Barrier(8)

    def take(number: int) -> None:
        barrier.wait()
        to = "running" if number % 2 else "cancelled"
        if store.move("ftjob-1", to, expected={"queued"}):
            won.append(to)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (status,) = won
    now = store.get(Job, "ftjob-1")
    assert now is not None
    assert now.status == status


def test_a_job_moves_along_the_arrows_only(store: Store) -> None:
    store.add(job(1))
    with pytest.raises(ValueError, match="from validating_files to succeeded"):
        store.move("ftjob-1", "succeeded", expected={"validating_files"})
    with pytest.raises(ValueError, match="by move"):
        store.update(Job, "ftjob-1", status="running")
    assert store.move("ftjob-1", "running", expected={"queued"}) is None
    assert store.move("ftjob-9", "running", expected={"queued"}) is None
    moved = store.move("ftjob-1", "failed", expected={"validating_files"}, error=JobError("c", "m"), finished_at=5)
    assert moved is not None
    assert (moved.status, moved.error, moved.finished_at) == ("failed", JobError("c", "m"), 5)
    for status in FINAL:
        assert not TRANSITIONS[status]
    for targets in TRANSITIONS.values():
        assert targets <= set(TRANSITIONS)


def test_a_transaction_is_kept_whole_or_not_at_all(store: Store) -> None:
    store.add(job(1))

    def half_done() -> None:
        with store.transaction():
            store.move("ftjob-1", "queued", expected={"validating_files"})
            with store.transaction():
                store.add(Event("ftevent-1", 1, "queued"), owner="ftjob-1")
            store.update(File, "file-0", bytes=1)  # there is no such file

    with pytest.raises(KeyError):
        half_done()
    now = store.get(Job, "ftjob-1")
    assert now is not None
    assert now.status == "validating_files"
    assert store.list(Event).data == []
    with store.transaction():
        store.add(Event("ftevent-1", 1, "queued"), owner="ftjob-1")
    assert len(store.list(Event).data) == 1


def test_reading_does_not_wait_for_a_writer_and_sees_nothing_unfinished(store: Store) -> None:
    store.add(job(1))
    seen: list[Any] = []
    with store.transaction():
        store.update(Job, "ftjob-1", estimated_finish=99)
        reader = threading.Thread(target=lambda: seen.append(store.get(Job, "ftjob-1")))
        reader.start()
        reader.join(timeout=10)
        assert seen == [job(1)]
    now = store.get(Job, "ftjob-1")
    assert now is not None
    assert now.estimated_finish == 99


def test_threads_that_have_ended_leave_no_connection_open(store: Store) -> None:
    store.add(job(1))
    for _ in range(30):
        thread = threading.Thread(target=lambda: store.get(Job, "ftjob-1"))
        thread.start()
        thread.join()
    assert len(store._connections) <= 2  # this thread's, and that of the last one
    assert store.get(Job, "ftjob-1") == job(1)


def test_what_was_committed_survives_a_killed_process(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom tunery.serve.records import Event\n"
        "from tunery.serve.store import Store\nstore = Store(Path(sys.argv[1]))\n"
        "for n in range(10**6):\n    store.add(Event(f'ftevent-{n}', n, 'x'))\n    print(n, flush=True)\n"
    )
    path = tmp_path / "server.sqlite3"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    told = 20 + len([line for line in process.stdout.read().split("\n") if line])
    process.wait()
    process.stdout.close()
    assert len(Store(path).list(Event).data) in (told, told + 1)


def test_a_database_of_a_newer_version_or_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "server.sqlite3"
    Store(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="newer version"):
        Store(path)
    other = tmp_path / "other.sqlite3"
    other.write_bytes(b"this is no database, however long one looks at it" * 100)
    with pytest.raises(ConfigError, match="cannot be used"):
        Store(other)


def test_ids_are_random_or_follow_from_their_parts() -> None:
    made = {new_id("file-") for _ in range(200)}
    assert len(made) == 200
    assert all(len(one) == 29 and one[5:].isascii() and one[5:].isalnum() for one in made)
    assert derived_id("ftevent-", "ftjob-1", "step", 5) == derived_id("ftevent-", "ftjob-1", "step", 5)
    others = [("ftjob-1", "step", 6), ("ftjob-1", "step5"), ("ftjob-1s", "tep", 5), ("ftjob-1", "step", "5", "")]
    assert (
        len({derived_id("ftevent-", *parts) for parts in others} | {derived_id("ftevent-", "ftjob-1", "step", 5)}) == 5
    )
    assert len(derived_id("", "x")) == 24
