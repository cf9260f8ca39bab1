"""Agreement of two models, counted by hand; and the settings that follow from a job."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunery.evaluation.agreement import Pair, certainty, compare_sides, same
from tunery.evaluation.answers import Answer, Question
from tunery.evaluation.label_reading import common_labels
from tunery.hosted.capture import Capture
from tunery.hosted.comparison import score_rows, side_headline
from tunery.hosted.task_from_job import mapping, target_name, task_from_job
from tunery.task_file import load_task


def pair(hosted: str, local: str, reference: str = "", sure: float | None = None) -> Pair:
    logprobs = None if sure is None else tuple((word, math.log(sure)) for word in hosted.split())
    question = Question("f:1", ({"role": "user", "content": "?"},), reference=reference, shown="?")
    return Pair(question, Answer(hosted, logprobs=logprobs), Answer(local))


def test_answers_are_the_same_but_for_white_space() -> None:
    assert same(" a  b\n", "a b")
    assert not same("A b", "a b")


def test_agreement_of_texts() -> None:
    pairs = [
        pair("red fish", "red fish", "red fish", 0.99),
        pair("red fish", "blue fish", "blue fish", 0.5),
        pair("one", "one ", "two", 0.95),
        pair("x", "y", "", 0.5),
    ]
    result = compare_sides(pairs, (), samples=3)
    assert result["agreement"]["exact"]["share"] == 0.5
    assert "label" not in result["agreement"]
    assert result["with_reference"] == 3
    assert result["hosted"]["exact"] == pytest.approx(1 / 3)
    assert result["local"]["exact"] == pytest.approx(2 / 3)
    assert [group["share"] for group in result["certainty"]] == [1.0, 0.0]
    assert [sample["agree"] for sample in result["samples"]] == [False, False, True], "those that differ come first"
    assert side_headline(result).startswith(
        "On 4 questions the model trained here gives the hosted model's very answer 50.0%"
    )


def test_agreement_of_labels() -> None:
    pairs = [
        pair("Good.", "good", "good"),
        pair("good", "bad", "bad"),
        pair("bad", "no idea", "bad"),
        pair("bad", "bad", "good"),
    ]
    result = compare_sides(pairs, ("bad", "good"), samples=4)
    assert result["agreement"]["label"]["share"] == 0.5
    assert result["agreement"]["exact"]["share"] == 0.25
    assert (result["hosted"]["accuracy"], result["local"]["accuracy"]) == (0.5, 0.5)
    assert result["between"] == {
        "labels": ["bad", "good", "(none of them)"],
        "counts": [[1, 0, 1], [1, 1, 0], [0, 0, 0]],
    }
    assert "gives the hosted model's label to 50.0% of 4 questions" in side_headline(result)
    names = [name for name, *_ in score_rows(result)]
    assert names[:2] == ["Same as the reference", "Accuracy"]
    assert result["between"]["labels"] == ["bad", "good", "(none of them)"]


def test_nothing_to_judge_by_leaves_agreement() -> None:
    result = compare_sides([pair("a", "a"), pair("b", "c")], (), samples=1)
    assert (result["with_reference"], result["hosted"], result["local"]) == (0, {}, {})
    assert score_rows(result) == []
    assert "certainty" not in result


def test_certainty_is_the_mean_probability_of_the_tokens() -> None:
    assert certainty(Answer("a b", logprobs=(("a", math.log(0.9)), ("b", math.log(0.4))))) == pytest.approx(0.6)
    assert certainty(Answer("a b")) is None


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        (["good", "bad "] * 10, ("bad", "good")),
        (["good"] * 20, ()),
        (["good", "bad"] * 4, ()),
        ([*["good", "bad"] * 10, "once"], ()),
        ([f"answer {i}" for i in range(30)] * 5, ()),
        (["a long answer that goes on and on and on, as people's do", "no"] * 10, ()),
        (["one\ntwo", "no"] * 10, ()),
    ],
    ids=["two labels", "one", "few rows", "one that stands once", "many", "long", "lines"],
)
def test_labels_are_a_few_short_answers_again_and_again(answers: list[str], labels: tuple[str, ...]) -> None:
    assert common_labels(answers) == labels


@pytest.mark.parametrize(
    ("job", "train"),
    [
        ({}, {"epochs": 3}),
        (
            {"hyperparameters": {"n_epochs": 2, "batch_size": 1, "learning_rate_multiplier": 0.5}},
            {"epochs": 2, "batch_size": 1, "learning_rate_multiplier": 0.5},
        ),
        ({"hyperparameters": {"n_epochs": "auto", "batch_size": "auto"}}, {"epochs": 3}),
        (
            {
                "hyperparameters": {"n_epochs": 4},
                "method": {
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": "auto", "batch_size": 2}},
                },
            },
            {"epochs": 4, "batch_size": 2},
        ),
        ({"method": {"type": "supervised"}}, {"epochs": 3}),
    ],
)
def test_a_job_that_tells_little_is_completed(tmp_path: Path, job: dict[str, Any], train: dict[str, Any]) -> None:
    job = {"id": "ftjob-1", "model": "gpt-4o", **job} if job else {}
    capture = Capture(tmp_path / "capture", job)
    (tmp_path / "task.yaml").write_text(task_from_job(capture, "smollm2-135m-instruct", Path("out"), "chat"))
    task = yaml.safe_load((tmp_path / "task.yaml").read_text())
    assert task["train"] == train
    assert task["data"]["validation"] == 0.1
    here = {what: here for what, _, here in mapping(capture, load_task(tmp_path / "task.yaml"), "chat")}
    assert (here["Epochs"], here["Held-out rows"]) == (str(train["epochs"]), "10% of the rows")


def test_a_run_is_named_after_its_base() -> None:
    assert target_name("Qwen/Qwen3-8B") == "Qwen-Qwen3-8B"
    assert target_name("./models/mine") == "mine"
    assert target_name("smollm2-135m-instruct") == "smollm2-135m-instruct"
