"""Fine-tuning jobs, through the official client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.serve.contract.conftest import ALIAS, async_client, chat_rows, wait_for
from tests.serve.running import Running


@pytest.fixture(scope="module")
def rows(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", chat_rows()), purpose="fine-tune").id


def test_the_job_as_it_ends(client: openai.OpenAI, trained: Any) -> None:
    assert trained.object == "fine_tuning.job"
    assert trained.id.startswith("ftjob-")
    assert trained.model == ALIAS
    assert trained.fine_tuned_model.startswith(f"ft:{ALIAS}:local:my-films:")
    assert trained.error is None
    assert trained.finished_at >= trained.created_at
    assert trained.trained_tokens > 0
    assert trained.seed == 3
    assert trained.metadata == {"team": "films", "run": "1"}
    assert trained.method.type == "supervised"
    settled = trained.method.supervised.hyperparameters
    assert (settled.n_epochs, settled.batch_size, settled.learning_rate_multiplier) == (2, 4, 0.5)
    assert trained.hyperparameters.n_epochs == 2
    assert client.fine_tuning.jobs.retrieve(trained.id) == trained


def test_events_tell_the_story(client: openai.OpenAI, trained: Any) -> None:
    events = list(client.fine_tuning.jobs.list_events(trained.id, limit=3))  # several pages
    assert len(events) == len({event.id for event in events}) > 3
    assert trained.id in events[-1].message  # newest first
    metrics = [event.data for event in events if event.type == "metrics"]
    assert metrics
    assert all(isinstance(data, dict) and data["train_loss"] > 0 for data in metrics)
    assert all(event.object == "fine_tuning.job.event" for event in events)
    warned = [event.message for event in events if event.level != "info"]
    assert all(" rows are held out: " in message for message in warned), warned
    first, second = client.fine_tuning.jobs.list_events(trained.id, limit=2).data
    after = client.fine_tuning.jobs.list_events(trained.id, after=first.id, limit=1).data
    assert [event.id for event in after] == [second.id]


def test_checkpoints_are_models(client: openai.OpenAI, trained: Any) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(trained.id, limit=1))
    assert checkpoints
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    assert steps == sorted(steps, reverse=True)
    for checkpoint in checkpoints:
        assert checkpoint.fine_tuning_job_id == trained.id
        name = f"{trained.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        assert checkpoint.fine_tuned_model_checkpoint == name
        assert checkpoint.metrics.train_loss or checkpoint.metrics.valid_loss
        assert client.models.retrieve(name).id == name


def test_the_result_file(client: openai.OpenAI, trained: Any) -> None:
    (result,) = trained.result_files
    assert client.files.retrieve(result).purpose == "fine-tune-results"
    lines = client.files.content(result).text.splitlines()
    assert lines[0].startswith("step,train_loss")
    assert len(lines) > 1
    assert result in [file.id for file in client.files.list(purpose="fine-tune-results")]


def test_lists_and_filters(client: openai.OpenAI, trained: Any, rows: str) -> None:
    other = client.fine_tuning.jobs.create(model=ALIAS, training_file=rows, metadata={"team": "letters"})
    plain = client.fine_tuning.jobs.create(model=ALIAS, training_file=rows)
    ids = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert ids.index(plain.id) < ids.index(other.id) < ids.index(trained.id)  # newest first
    films = [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "films"})]
    assert films == [trained.id]
    assert not client.fine_tuning.jobs.list(metadata={"team": "films", "run": "2"}).data
    without = [job.id for job in client.fine_tuning.jobs.list(limit=1, extra_query={"metadata": "null"})]
    assert plain.id in without
    assert other.id not in without
    for job in (other, plain):
        client.fine_tuning.jobs.cancel(job.id)


def test_the_older_place_of_hyperparameters(older: Any) -> None:
    assert older.hyperparameters.n_epochs == 1
    assert isinstance(older.hyperparameters.batch_size, int | str)
    assert older.validation_file is None


def test_cancelling(client: openai.OpenAI, rows: str) -> None:
    job = client.fine_tuning.jobs.create(model=ALIAS, training_file=rows)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.fine_tuning.jobs.cancel(job.id)


def test_pausing_and_resuming(client: openai.OpenAI, lenient: openai.OpenAI, rows: str) -> None:
    """A paused job's status is "paused", as the reference's example shows; the client's own type does not list it, so a
    client with strict validation cannot read such a job, and one with the client's defaults can."""
    job = client.fine_tuning.jobs.create(
        model=ALIAS, training_file=rows, hyperparameters={"n_epochs": 50, "batch_size": 1}
    )
    assert lenient.fine_tuning.jobs.pause(job.id).status == "paused"  # type: ignore[comparison-overlap]
    assert lenient.fine_tuning.jobs.retrieve(job.id).status == "paused"  # type: ignore[comparison-overlap]
    with pytest.raises(openai.APIResponseValidationError):
        client.fine_tuning.jobs.retrieve(job.id)
    assert client.fine_tuning.jobs.resume(job.id).status in ("validating_files", "queued")
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.resume(job.id)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_bad_file_fails_the_job(client: openai.OpenAI) -> None:
    broken = chat_rows() + b'{"messages": [{"content": "broken"}]}\n'
    file = client.files.create(file=("broken.jsonl", broken), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=ALIAS, training_file=file.id)
    done = wait_for(client, job.id)
    assert done.status == "failed"
    assert done.error is not None
    assert (done.error.code, done.error.param) == ("invalid_training_file", "training_file")
    assert "Example" in done.error.message
    assert done.fine_tuned_model is None


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": "gpt-9"}, "model", "model_not_found"),
        ({"training_file": "file-gone"}, "training_file", None),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "integer_above_max_value"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "invalid_type"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs", "unknown_parameter"),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_value"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "invalid_value"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}},
            "method.dpo.hyperparameters.beta",
            "decimal_above_max_value",
        ),
        ({"suffix": "x" * 65}, "suffix", "string_above_max_length"),
        ({"seed": -1}, "seed", "integer_below_min_value"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "object_above_max_properties"),
        ({"integrations": [{"type": "wandb"}]}, "integrations[0].wandb", "missing_required_parameter"),
        ({"extra_body": {"trainng_file": "x"}}, "trainng_file", "unknown_parameter"),
    ],
)
def test_requests_that_cannot_be(
    client: openai.OpenAI, rows: str, changes: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.fine_tuning.jobs.create(**{"model": ALIAS, "training_file": rows, **changes})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    if code:
        assert caught.value.code == code


def test_jobs_that_are_not_there(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    for job_id in ("ftjob-" + "a" * 24, "nonsense"):
        for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
            with pytest.raises(openai.NotFoundError):
                call(job_id)


def test_asynchronous(server: Running, trained: Any) -> None:
    async def life() -> None:
        async with async_client(server) as client:
            file = await client.files.create(file=("rows.jsonl", chat_rows()), purpose="fine-tune")
            job = await client.fine_tuning.jobs.create(model=ALIAS, training_file=file.id)
            assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
            assert job.id in [entry.id async for entry in client.fine_tuning.jobs.list(limit=1)]
            events = [event async for event in client.fine_tuning.jobs.list_events(trained.id, limit=2)]
            assert len(events) > 2
            found = [part async for part in client.fine_tuning.jobs.checkpoints.list(trained.id)]
            assert found[0].fine_tuning_job_id == trained.id
            assert await client.fine_tuning.jobs.retrieve(trained.id) == trained

    asyncio.run(life())
