"""Creating jobs and listing them. No worker runs here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.jobs.world import World, chat_rows, fake_world
from tunery.serve.api_errors import ApiError
from tunery.serve.jobs.translate import JobSpec
from tunery.serve.records import Job, Model, Work
from tunery.serve.store import Store

ROWS = chat_rows(10)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return fake_world(tmp_path)


def refusal(world: World, file: str, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        world.create(file, **fields)
    assert world.store.list(Job).data == []
    assert list((world.home / "jobs").iterdir()) == []
    return error.value


def test_a_new_job_says_what_was_asked_for(world: World) -> None:
    training, validation = world.upload(ROWS), world.upload(ROWS)
    job = world.create(
        training,
        model="gpt-4o-mini-2024-07-18",
        validation_file=validation,
        suffix="my films",
        seed=11,
        metadata={"team": "a"},
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}},
        integrations=[{"type": "wandb", "wandb": {"project": "films", "tags": ["x"]}}],
    )
    assert (job.model, job.training_file, job.validation_file) == ("gpt-4o-mini-2024-07-18", training, validation)
    assert (job.seed, job.metadata, job.organization_id) == (11, {"team": "a"}, "local")
    assert job.method == {
        "type": "dpo",
        "dpo": {
            "hyperparameters": {
                "n_epochs": 2,
                "batch_size": "auto",
                "learning_rate_multiplier": "auto",
                "beta": 0.2,
            }
        },
    }
    assert job.hyperparameters == {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job.integrations == [
        {"type": "wandb", "wandb": {"project": "films", "name": None, "entity": None, "tags": ["x"]}}
    ]
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.result_files) == (None, None, None, [])
    assert world.jobs.get(job.id) == job
    work = world.store.get(Work, job.id)
    assert work is not None
    assert work.name.startswith("ft:gpt-4o-mini-2024-07-18:local:my-films:")
    spec = JobSpec.read(world.folder(job))
    assert (spec.base, spec.method, spec.asked) == ("a-base", "dpo", {"n_epochs": 2, "beta": 0.2})
    assert spec.environment == {
        "WANDB_NAME": job.id,
        "WANDB_RUN_ID": job.id,
        "WANDB_RESUME": "allow",
        "WANDB_PROJECT": "films",
        "WANDB_TAGS": "x",
    }


def test_without_a_suffix_the_name_has_two_colons_and_without_a_seed_there_is_one(world: World) -> None:
    file = world.upload(ROWS)
    first, second = world.create(file), world.create(file)
    work = world.store.get(Work, first.id)
    assert work is not None
    assert work.name.startswith("ft:a-base:local::")
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**31
    assert first.id != second.id


def test_what_cannot_be_is_refused_and_leaves_nothing(world: World) -> None:
    file = world.upload(ROWS)
    assert refusal(world, file, model="gpt-5").code == "model_not_found"
    missing = refusal(world, "file-none")
    assert (missing.status, missing.param) == (400, "training_file")
    assert refusal(world, file, validation_file="../x").param == "validation_file"
    result = world.files.add_result("file-result", "r.csv", b"x")
    assert "purpose" in refusal(world, result.id).message


def test_a_job_keeps_its_data_when_the_files_are_deleted(world: World) -> None:
    training, validation = world.upload(ROWS, "mine.jsonl"), world.upload(ROWS[:3])
    job = world.create(training, validation_file=validation)
    for file in (training, validation):
        world.files.delete(file)
    folder = world.folder(job)
    lines = folder.data("training_file").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert len(folder.data("validation_file").read_text().splitlines()) == 3
    assert refusal_only(world, training).param == "training_file"


def refusal_only(world: World, file: str) -> ApiError:
    with pytest.raises(ApiError) as error:
        world.create(file)
    return error.value


def test_a_job_on_a_fine_tuned_model_has_a_copy_of_its_adapter(world: World) -> None:
    name = "ft:a-base:local:films:abcd1234"
    adapter = world.home / "jobs" / "ftjob-1" / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    world.store.add(Model(name, "a-base", 1), owner="ftjob-1")
    job = world.create(world.upload(ROWS), model=name, suffix="more")
    world.registry.delete(name)
    assert (world.folder(job).start / "adapter_model.safetensors").read_bytes() == b"weights"
    assert JobSpec.read(world.folder(job)).goes_on
    work = world.store.get(Work, job.id)
    assert work is not None
    assert work.name.startswith("ft:a-base:local:more:")  # names do not grow
    assert job.model == name


def test_lists_are_newest_first_in_pages_and_by_metadata(world: World) -> None:
    file = world.upload(ROWS)
    jobs = [world.create(file, metadata={"n": str(number % 2)}) for number in range(5)]
    first = world.jobs.list(limit=2)
    assert ([job.id for job in first.data], first.has_more) == ([jobs[4].id, jobs[3].id], True)
    rest = world.jobs.list(after=first.last_id)
    assert ([job.id for job in rest.data], rest.has_more) == ([jobs[2].id, jobs[1].id, jobs[0].id], False)
    odd = world.jobs.list(metadata={"n": "1"})
    assert [job.id for job in odd.data] == [jobs[3].id, jobs[1].id]
    with pytest.raises(ApiError) as error:
        world.jobs.list(after="ftjob-none")
    assert (error.value.status, error.value.param) == (400, "after")
    events = world.jobs.events(jobs[0].id, limit=1)
    assert (events.data[0].message, events.has_more) == (f"Validating training file: {file}", True)
    assert world.jobs.checkpoints(jobs[0].id).data == []
    for look in (world.jobs.get, world.jobs.events, world.jobs.checkpoints, world.jobs.run_dir):
        with pytest.raises(ApiError) as error:
            look("ftjob-none")
        assert error.value.status == 404


def test_a_job_is_there_for_the_next_server(world: World) -> None:
    job = world.create(world.upload(ROWS))
    world.store.close()
    assert Store(world.home / "server.sqlite3").get(Job, job.id) == job
    assert world.folder(job).run.root == world.home / "jobs" / job.id / "run"
