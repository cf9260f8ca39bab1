"""What settings become in a job, and that none is passed over in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunery.config import Task
from tunery.errors import ConfigError
from tunery.hosted.job_settings import given, method, require_meaning, to_yaml
from tunery.task_file import absolute, load_task


def task(**more: Any) -> Task:
    return Task.model_validate({"model": "openai:gpt-4.1-mini", "data": {"train": "rows.csv"}, **more})


def test_what_was_left_out_is_not_given() -> None:
    assert list(given(task())) == ["model", "data.train"]
    assert list(given(task(lora={"rank": 16}))) == ["model", "data.train", "lora.rank"]
    assert list(given(absolute(task()))) == ["model", "data.train"], "a Task from Python, with its paths made absolute"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"lora": {"rank": 16}}, "lora.rank: no meaning"),
        ({"train": {"warmup": 0.1, "precision": "float32"}}, "train.warmup, train.precision: no meaning"),
        ({"data": {"train": "rows.csv", "max_length": 99}}, "data.max_length: no meaning"),
        ({"train": {"learning_rate": 1e-4}}, "learning_rate_multiplier instead"),
        ({"train": {"epochs": 1.5}}, "1.5; a hosted model takes a whole number from 1 to 50"),
        ({"train": {"max_steps": 5}}, "train.max_steps: no meaning"),
        ({"train": {"batch_size": 300}}, "at most 256"),
        ({"seed": 2**40}, "seed"),
        ({"model": "openai:"}, "names no model"),
    ],
)
def test_a_setting_that_nobody_would_follow_is_an_error(more: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        require_meaning(task(**more))


def test_the_settings_that_count_become_hyperparameters() -> None:
    asked = task(train={"epochs": 3, "batch_size": 8, "learning_rate": "auto", "learning_rate_multiplier": 1.0})
    require_meaning(asked)
    assert method(asked, "chat") == {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}},
    }
    defaults = method(task(), "classification")["supervised"]["hyperparameters"]
    assert defaults == {"n_epochs": 1, "batch_size": 16, "learning_rate_multiplier": "auto"}
    pairs = method(task(train={"beta": 0.2}), "preference")
    assert pairs["type"] == "dpo"
    assert pairs["dpo"]["hyperparameters"]["beta"] == 0.2
    assert method(task(), "preference")["dpo"]["hyperparameters"]["beta"] == "auto"
    with pytest.raises(ConfigError, match=r"train\.beta has no meaning"):
        method(task(train={"beta": 0.2}), "chat")


def test_the_task_that_is_written_down_means_the_same_when_it_is_read(tmp_path: Path) -> None:
    for asked in (task(train={"epochs": 2}), task(train={"learning_rate_multiplier": 0.5}, hosted={"parallel": 2})):
        (tmp_path / "task.yaml").write_text(to_yaml(asked))
        again = load_task(tmp_path / "task.yaml")
        require_meaning(again)
        assert method(again, "chat") == method(asked, "chat")
        assert again.hosted == asked.hosted
        assert "lora" not in yaml.safe_load(to_yaml(asked))
