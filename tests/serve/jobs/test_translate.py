"""From requests to tasks: what hyperparameters mean, and what "auto" settles to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunery.config import Task
from tunery.errors import ConfigError
from tunery.serve.api_errors import ApiError
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.jobs.translate import JobSpec, asked_of, check_defaults, make_task, settle, trackers_of
from tunery.serve.schemas import CreateJob


def request(**fields: Any) -> CreateJob:
    return CreateJob.model_validate({"model": "m", "training_file": "file-a", **fields})


def task(spec: JobSpec, tmp_path: Path, kind: Any = "chat", examples: int = 100) -> Task:
    return make_task(spec, JobFolder(tmp_path), kind, settle(spec.asked, spec.method, examples), "float32")


@pytest.mark.parametrize(
    ("examples", "epochs", "batch"),
    [
        (10, 10, 4),
        (20, 5, 4),
        (33, 4, 4),
        (34, 3, 4),
        (2_000, 3, 4),
        (2_500, 3, 5),
        (5_999, 3, 12),
        (6_000, 2, 12),
        (10_000, 2, 20),
        (10_001, 1, 20),
        (100_000, 1, 200),
        (1_000_000, 1, 256),
    ],
)
def test_auto_is_settled_by_the_documented_rule(examples: int, epochs: int, batch: int) -> None:
    settled = settle({}, "supervised", examples)
    assert settled == {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": 1.0}
    assert settle({}, "dpo", examples) == {**settled, "beta": 0.1}


def test_what_was_asked_for_stays_and_a_batch_has_no_more_rows_than_there_are() -> None:
    asked = {"n_epochs": 7, "batch_size": 64, "learning_rate_multiplier": 0.5}
    assert settle(asked, "supervised", 1000) == asked
    assert settle(asked, "supervised", 40) == {**asked, "batch_size": 40}


def test_the_older_field_and_the_method_ask_for_the_same() -> None:
    numbers = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2}
    older = request(hyperparameters=numbers)
    newer = request(method={"type": "supervised", "supervised": {"hyperparameters": numbers}})
    assert asked_of(older) == asked_of(newer) == {"n_epochs": 2, "learning_rate_multiplier": 2.0}
    assert asked_of(request()) == {}
    dpo = request(method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}})
    assert asked_of(dpo) == {"beta": 0.3, "n_epochs": 1}


def test_a_supervised_job_becomes_this_task(tmp_path: Path) -> None:
    spec = JobSpec("base", "supervised", 7, asked={"n_epochs": 2, "learning_rate_multiplier": 1.5})
    made = task(spec, tmp_path)
    assert (made.name, made.model, made.output, made.seed) == ("run", "base", str(tmp_path), 7)
    assert (made.data.train, made.data.validation, made.data.kind) == (str(tmp_path / "train.jsonl"), None, "chat")
    assert (made.train.epochs, made.train.batch_size, made.train.learning_rate_multiplier) == (2, 4, 1.5)
    assert (made.train.save_limit, made.train.save_steps, made.train.precision) == (3, "auto", "float32")
    assert made.train.report_to == ()
    assert (made.lora.rank, made.lora.targets, made.lora.start) == (16, "all-linear", None)


def test_a_preference_job_and_a_validation_file_become_this_task(tmp_path: Path) -> None:
    made = task(JobSpec("base", "dpo", 7, asked={"beta": 0.3}, has_validation=True), tmp_path, "preference")
    assert made.data.validation == str(tmp_path / "validation.jsonl")
    assert (made.data.kind, made.train.beta) == ("preference", 0.3)
    assert made.evaluate.enabled
    assert task(JobSpec("base", "dpo", 7), tmp_path, "preference").train.beta == 0.1


def test_the_owners_settings_hold_where_the_job_does_not_decide(tmp_path: Path) -> None:
    defaults = {
        "lora": {"rank": 4, "dropout": 0.1},
        "train": {"precision": "bfloat16", "save_limit": 1, "learning_rate": 0.02},
        "evaluate": {"enabled": False},
        "data": {"max_length": 128},
    }
    check_defaults(defaults)
    made = task(JobSpec("base", "supervised", 7, defaults=defaults), tmp_path)
    assert (made.lora.rank, made.train.precision, made.train.save_limit) == (4, "bfloat16", 1)
    assert (made.train.learning_rate, made.evaluate.enabled, made.data.max_length) == (0.02, False, 128)
    goes_on = task(JobSpec("base", "supervised", 7, goes_on=True, defaults=defaults), tmp_path)
    assert goes_on.lora.start == str(tmp_path / "start")
    assert "rank" not in goes_on.lora.model_fields_set
    assert goes_on.lora.dropout == 0.1


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ({"train": {"epochs": 3}}, "train.epochs is decided by each job"),
        ({"data": {"train": "/etc/passwd"}}, "data.train is decided by each job"),
        ({"train": {"report_to": ["wandb"]}}, "train.report_to is decided"),
        ({"lora": {"rank": -1}}, "lora.rank"),
        ({"lora": {"rnak": 4}}, "lora.rnak"),
        ({"lora": 4}, "lora is not a section"),
        ({"model": {"a": 1}}, "model is not a section"),
    ],
)
def test_settings_for_all_jobs_that_cannot_be_are_refused(defaults: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_defaults(defaults)


def test_wandb_is_told_by_its_own_variables(tmp_path: Path) -> None:
    wandb = {"project": "films", "name": "first", "entity": "team", "tags": ["a", "b"]}
    trackers, environment = trackers_of(request(integrations=[{"type": "wandb", "wandb": wandb}]))
    assert trackers == ["wandb"]
    assert environment == {
        "WANDB_PROJECT": "films",
        "WANDB_NAME": "first",
        "WANDB_ENTITY": "team",
        "WANDB_TAGS": "a,b",
    }
    assert task(JobSpec("base", "supervised", 7, trackers=trackers), tmp_path).train.report_to == ("wandb",)
    assert trackers_of(request()) == ([], {})
    twice = [{"type": "wandb", "wandb": {"project": "films"}}] * 2
    with pytest.raises(ApiError, match="once"):
        trackers_of(request(integrations=twice))
    with pytest.raises(ApiError, match="comma"):
        trackers_of(request(integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["a,b"]}}]))
