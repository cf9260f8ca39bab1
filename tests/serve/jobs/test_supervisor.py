"""What becomes of jobs when their workers end in this way or that. The workers are stand-ins (fake_worker.py)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.serve.jobs.world import World, chat_rows, fake_world, until
from tunery.errors import ConfigError
from tunery.serve.api_errors import ApiError
from tunery.serve.jobs import process, supervisor
from tunery.serve.jobs.process import Worker
from tunery.serve.records import Job, Model, Work

ROWS = chat_rows(10)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins are quick, so the supervisor looks at them often."""
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(supervisor, "RETRY_SECONDS", 0.3)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Worker]]:
    """Every worker that is started, so that a test can do harm to it."""
    workers: list[Worker] = []
    real = process.Worker.__init__

    def noted(self: Worker, *args: Any, **more: Any) -> None:
        real(self, *args, **more)
        workers.append(self)

    monkeypatch.setattr(process.Worker, "__init__", noted)
    yield workers
    for worker in workers:
        if worker.exit_code() is None:
            worker.kill()


def starts(world: World) -> list[str]:
    """The phases that were begun, in order: "train ftjob-…"."""
    return (world.home / "starts.log").read_text().splitlines()


def waiting(world: World, job: Job) -> bool:
    return (world.folder(job).root / "waiting").exists()


def test_a_job_goes_through_its_statuses_to_a_named_model(tmp_path: Path) -> None:
    with fake_world(tmp_path) as world:
        job = world.create(world.upload(ROWS), suffix="films", seed=3)
        assert job.status == "validating_files"
        assert job.hyperparameters["n_epochs"] == "auto"
        done = world.wait(job, "succeeded")
        assert done.fine_tuned_model is not None
        assert done.fine_tuned_model.startswith("ft:a-base:local:films:")
        assert len(done.fine_tuned_model.rsplit(":", 1)[1]) == 8
        assert done.hyperparameters == {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0}
        assert done.method == {"type": "supervised", "supervised": {"hyperparameters": done.hyperparameters}}
        assert (done.trained_tokens, done.error, done.estimated_finish) == (1234, None, None)
        assert done.finished_at is not None
        (result,) = done.result_files
        assert world.files.content(result).read_text().splitlines()[1] == "1,2.0,,,"
        assert world.files.get(result).purpose == "fine-tune-results"
        assert world.registry.resolve(done.fine_tuned_model).key == job.id
        assert world.messages(job) == [
            f"Created fine-tuning job: {job.id}",
            f"Validating training file: {job.training_file}",
            "Files validated, moving job to queued state",
            "Fine-tuning job started",
            "Step 1/3: training loss=2.00",
            "Step 2/3: training loss=1.00",
            "Step 3/3: training loss=0.00",
            "a word of warning",
            f"New fine-tuned model created: {done.fine_tuned_model}",
            "The job has successfully completed",
        ]
        assert [event.level for event in world.events(job)].count("warn") == 1


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
def test_a_worker_that_gives_up_fails_the_job_for_the_reason_it_wrote(tmp_path: Path, code: int) -> None:
    with fake_world(tmp_path, train=f"exit {code}") as world:
        job = world.create(world.upload(ROWS))
        failed = world.wait(job, "failed")
        assert failed.error is not None
        assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
        assert failed.error.message == "Example 4: no good"
        assert failed.finished_at is not None
        last = world.events(job)[-1]
        assert (last.level, last.message) == ("error", "Example 4: no good")
        assert world.store.list(Model).data == []


def test_files_that_are_no_good_fail_the_job_before_it_is_queued(tmp_path: Path) -> None:
    with fake_world(tmp_path, validate="exit 3") as world:
        job = world.create(world.upload(ROWS))
        assert world.wait(job, "failed").error is not None
        assert "Files validated, moving job to queued state" not in world.messages(job)
        assert starts(world) == [f"validate {job.id}"]


def test_a_dead_worker_is_replaced_three_times_and_no_more(tmp_path: Path) -> None:
    with fake_world(tmp_path, train="kill") as world:
        job = world.create(world.upload(ROWS))
        failed = world.wait(job, "failed")
        assert failed.error is not None
        assert failed.error.code == "worker_crashed"
        assert "died 4 times" in failed.error.message
        assert "SIGKILL, perhaps for running out of memory" in failed.error.message
        assert "fake worker: kill" in failed.error.message  # the last lines of its log
        assert starts(world).count(f"train {job.id}") == 4
        assert sum("begins again" in message for message in world.messages(job)) == 3


def test_a_worker_that_gets_further_each_time_may_die_more_often(tmp_path: Path) -> None:
    with fake_world(tmp_path, train=[*["checkpoint+kill"] * 6, "ok"]) as world:
        job = world.create(world.upload(ROWS))
        world.wait(job, "succeeded")
        said = [message for message in world.messages(job) if "resumes from step" in message]
        assert len(said) == 6
        assert said[-1].endswith("the job resumes from step 6")


def test_a_look_at_files_that_dies_is_tried_again(tmp_path: Path) -> None:
    with fake_world(tmp_path, validate=["kill", "kill", "ok"]) as world:
        world.wait(world.create(world.upload(ROWS)), "succeeded")
    with fake_world(tmp_path / "other", validate="kill") as world:
        failed = world.wait(world.create(world.upload(ROWS)), "failed")
        assert failed.error is not None
        assert failed.error.code == "worker_crashed"


def test_a_full_disk_pauses_the_job_and_it_can_be_resumed(tmp_path: Path) -> None:
    with fake_world(tmp_path, train=["exit 75", "ok"]) as world:
        job = world.create(world.upload(ROWS))
        world.wait(job, "paused")
        last = world.events(job)[-1]
        assert last.level == "error"
        assert "disk is full" in last.message
        assert world.jobs.resume(job.id).status == "queued"
        world.wait(job, "succeeded")


def test_pausing_waits_for_the_checkpoint_and_resuming_goes_on(tmp_path: Path) -> None:
    with fake_world(tmp_path, train=["wait", "ok"]) as world:
        job = world.create(world.upload(ROWS))
        until(lambda: waiting(world, job))
        paused = world.jobs.pause(job.id)
        assert paused.status == "paused"
        assert (world.folder(job).run.checkpoints / "step-1").is_dir()
        assert [checkpoint.step_number for checkpoint in world.jobs.checkpoints(job.id).data] == [1]
        assert world.jobs.pause(job.id).status == "paused"  # again: nothing changes
        time.sleep(0.5)
        assert world.jobs.get(job.id).status == "paused"
        assert world.jobs.resume(job.id).status == "queued"
        world.wait(job, "succeeded")
        messages = world.messages(job)
        assert messages.index("The job is paused") < messages.index("The job is resumed")
        assert messages.count("Fine-tuning job started") == 1


def test_a_paused_job_frees_its_slot(tmp_path: Path) -> None:
    with fake_world(tmp_path, train="wait") as world:
        first, second = (world.create(world.upload(ROWS)) for _ in range(2))
        until(lambda: waiting(world, first))
        until(lambda: world.jobs.get(second.id).status == "queued")
        world.jobs.pause(first.id)
        until(lambda: waiting(world, second))
        assert world.jobs.resume(first.id).status == "queued"
        time.sleep(0.5)
        assert world.jobs.get(first.id).status == "queued"


def test_a_job_can_be_paused_before_it_runs(tmp_path: Path) -> None:
    with fake_world(tmp_path, validate=["wait", "ok"], train="ok") as world:
        job = world.create(world.upload(ROWS))
        until(lambda: waiting(world, job))
        assert world.jobs.pause(job.id).status == "paused"
        until(lambda: not process.is_locked(world.folder(job)))  # resumed before that, it would just go on
        assert world.jobs.resume(job.id).status == "validating_files"
        world.wait(job, "succeeded")
        assert starts(world).count(f"validate {job.id}") == 2


def test_cancelling_ends_the_worker_for_good(tmp_path: Path, started: list[Worker]) -> None:
    with fake_world(tmp_path, train="wait") as world:
        job = world.create(world.upload(ROWS))
        until(lambda: waiting(world, job))
        cancelled = world.jobs.cancel(job.id)
        assert cancelled.status == "cancelled"
        assert cancelled.finished_at is not None
        until(lambda: all(worker.exit_code() is not None for worker in started))
        until(lambda: world.jobs.checkpoints(job.id).data)  # what it wrote at its end can be used
        assert world.jobs.get(job.id).status == "cancelled"
        assert world.messages(job).count("The job has been cancelled") == 1


def test_a_cancelled_worker_that_does_not_listen_is_killed(
    tmp_path: Path, started: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_world(tmp_path, train=["stubborn", "ok"]) as world:
        monkeypatch.setattr(world.jobs._supervisor, "_grace", 0.5)
        job = world.create(world.upload(ROWS))
        until(lambda: waiting(world, job))
        other = world.create(world.upload(ROWS))
        world.jobs.cancel(job.id)
        until(lambda: [worker.exit_code() for worker in started if worker.job_id == job.id] == [0, -signal.SIGKILL])
        until(lambda: world.jobs.get(other.id).status == "running")  # the slot is free
        world.jobs.cancel(other.id)


def test_what_is_over_cannot_be_cancelled_paused_or_resumed(tmp_path: Path) -> None:
    with fake_world(tmp_path) as world:
        done = world.wait(world.create(world.upload(ROWS)), "succeeded")
        for change in (world.jobs.cancel, world.jobs.pause, world.jobs.resume):
            with pytest.raises(ApiError, match="has succeeded and cannot be") as error:
                change(done.id)
            assert error.value.status == 400
            with pytest.raises(ApiError) as unknown:
                change("ftjob-none")
            assert unknown.value.status == 404


def test_only_a_paused_job_can_be_resumed(tmp_path: Path) -> None:
    with fake_world(tmp_path, train="wait") as world:
        job = world.create(world.upload(ROWS))
        until(lambda: waiting(world, job))
        with pytest.raises(ApiError, match="is running; only a paused job") as error:
            world.jobs.resume(job.id)
        assert error.value.status == 400


def test_jobs_run_in_order_and_as_many_as_there_are_slots(tmp_path: Path) -> None:
    with fake_world(tmp_path, train="wait", slots=2) as world:
        jobs = [world.create(world.upload(ROWS)) for _ in range(4)]
        until(lambda: waiting(world, jobs[1]))
        until(lambda: world.jobs.get(jobs[3].id).status == "queued")  # looked at while others run
        assert [world.jobs.get(job.id).status for job in jobs] == ["running", "running", "queued", "queued"]
        world.jobs.cancel(jobs[0].id)
        until(lambda: waiting(world, jobs[2]))
        assert world.jobs.get(jobs[3].id).status == "queued"
        assert [line for line in starts(world) if line.startswith("train")] == [f"train {job.id}" for job in jobs[:3]]


def test_a_server_that_ends_leaves_no_job_that_seems_to_run(tmp_path: Path) -> None:
    with fake_world(tmp_path, train=["wait", "ok"]) as world:
        job = world.create(world.upload(ROWS))
        until(lambda: waiting(world, job))
    with fake_world(tmp_path, train=["wait", "ok"]) as world:
        assert world.jobs.get(job.id).status in ("queued", "running", "succeeded")
        world.wait(job, "succeeded")
        assert not any("died" in message for message in world.messages(job))


def test_jobs_of_a_server_that_was_killed_are_taken_up_once_their_workers_are_gone(tmp_path: Path) -> None:
    world = fake_world(tmp_path)
    job, paused = (world.create(world.upload(ROWS)) for _ in range(2))  # nobody has started the supervisor
    for one in (job, paused):
        world.store.move(one.id, "queued", expected={"validating_files"})
        world.store.move(one.id, "running", expected={"queued"})
        world.store.update(Work, one.id, validated=True)
    world.store.update(Work, paused.id, wanted="pause")
    world.store.close()
    with FileLock(worker_lock(tmp_path, job)), fake_world(tmp_path) as again:  # its worker still writes a checkpoint
        until(lambda: again.jobs.get(paused.id).status == "paused")
        time.sleep(0.5)
        assert again.jobs.get(job.id).status == "running"
        assert not (tmp_path / "starts.log").exists()
    with fake_world(tmp_path) as again:
        again.wait(job, "succeeded")
        assert any("started again" in message for message in again.messages(job))
        assert again.jobs.get(paused.id).status == "paused"


def worker_lock(home: Path, job: Job) -> Path:
    return home / "jobs" / job.id / "worker.lock"


def test_half_made_folders_are_removed_and_two_servers_do_not_share_one_home(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "ftjob-half").mkdir(parents=True)
    with fake_world(tmp_path) as world:
        assert list((tmp_path / "jobs").iterdir()) == []
        second = World(tmp_path, world.base)
        with pytest.raises(ConfigError, match="another server is working"):
            second.jobs.start()
        second.store.close()


def test_the_supervisor_outlives_trouble_with_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_world(tmp_path) as world:
        real, failed = world.files.add_result, []

        def full_once(*args: Any) -> Any:
            if not failed:
                failed.append(args)
                raise OSError(28, "No space left on device")
            return real(*args)

        monkeypatch.setattr(world.files, "add_result", full_once)
        job = world.create(world.upload(ROWS))
        world.wait(job, "succeeded")
        assert failed
        assert world.messages(job).count("The job has successfully completed") == 1


def test_a_deleted_file_is_gone_from_jobs_too_once_they_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SWEEP_SECONDS", 0.0)
    with fake_world(tmp_path, train=["wait", "ok"]) as world:
        deleted, kept = world.upload(ROWS), world.upload(ROWS[:4])
        job = world.create(deleted, validation_file=kept)
        until(lambda: waiting(world, job))
        world.files.delete(deleted)
        time.sleep(0.5)
        folder = world.folder(job)
        assert folder.data("training_file").exists()  # the job needs it
        world.jobs.pause(job.id)
        assert folder.data("training_file").exists()
        world.jobs.resume(job.id)
        world.wait(job, "succeeded")
        until(lambda: not folder.data("training_file").exists())
        assert folder.data("validation_file").exists()


def test_a_worker_is_in_a_session_of_its_own_and_does_not_import_from_the_current_folder(
    tmp_path: Path, started: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with fake_world(tmp_path, train="wait") as world:
        job = world.create(world.upload(ROWS))
        until(lambda: waiting(world, job))
        pid = started[-1].pid
        assert os.getsid(pid) == pid
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0") if Path("/proc").exists() else ["-P"]
        assert "-P" in command
