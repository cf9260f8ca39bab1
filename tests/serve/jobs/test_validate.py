"""The look at a job's files: every problem is named with its example, and good files become a task."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.serve.jobs.world import chat_row, chat_rows, pair_rows
from tunery.errors import ConfigError
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.jobs.translate import JobSpec
from tunery.serve.jobs.validate import BadFileError, Facts, validate
from tunery.task_file import load_task

Check = Callable[..., Facts]


def lines(rows: Iterable[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def check(tmp_path: Path, base: str, quick: dict[str, Any]) -> Check:
    """Validates a job with these rows."""

    def checked(rows: Iterable[Any], validation: Iterable[Any] | None = None, **fields: Any) -> Facts:
        folder = JobFolder(tmp_path)
        spec = JobSpec(
            **{
                "base": base,
                "method": "supervised",
                "seed": 3,
                "has_validation": validation is not None,
                "defaults": quick,
                **fields,
            }
        )
        folder.request.write_text(json.dumps(asdict(spec)))
        folder.data("training_file").write_text(lines(rows))
        if validation is not None:
            folder.data("validation_file").write_text(lines(validation))
        return validate(folder)

    return checked


def refusal(check: Check, rows: Iterable[Any], validation: Iterable[Any] | None = None, **fields: Any) -> BadFileError:
    with pytest.raises(BadFileError) as error:
        check(rows, validation, **fields)
    return error.value


def test_good_files_become_a_task_with_settled_numbers(check: Check, tmp_path: Path) -> None:
    facts = check(chat_rows(40), chat_rows(5, start=100), asked={"batch_size": 8})
    assert (facts.kind, facts.examples, facts.validation_examples) == ("chat", 40, 5)
    assert facts.hyperparameters == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert facts.steps == 15
    assert json.loads((tmp_path / "validated.json").read_text()) == asdict(facts)
    task = load_task(tmp_path / "task.yaml")
    assert (task.data.kind, task.train.batch_size, task.train.epochs, task.lora.rank) == ("chat", 8, 3, 4)
    assert task.run_dir == tmp_path / "run"


def test_prompt_and_completion_files_are_taken_too(check: Check) -> None:
    rows = [{"prompt": f"film {n} is ", "completion": "fine"} for n in range(12)]
    assert check(rows).kind == "completion"
    pairs = check(pair_rows(12), method="dpo")
    assert (pairs.kind, pairs.hyperparameters["beta"]) == ("preference", 0.1)


def test_every_problem_is_named_by_example_message_and_remedy(check: Check) -> None:
    rows = chat_rows(12)
    rows[3] = {"messages": [{"role": "user", "content": "a"}, {"role": "assitant", "content": "b"}]}
    rows[7] = {"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}
    rows[9] = "{not json"  # type: ignore[call-overload]
    error = refusal(check, rows)
    assert error.param == "training_file"
    first, *problems = str(error.message).splitlines()
    assert first.startswith("The job failed due to an invalid training file. ")
    assert f"in 3 of {len(rows)} examples" in first
    assert any(line.startswith("Example 4, message 2 (messages[1].role): unknown role 'assitant'") for line in problems)
    assert any("did you mean assistant?" in line for line in problems)
    assert any(line.startswith("Example 8, message 1 (messages[0].content): missing") for line in problems)
    assert any(line.startswith("Example 10") and "JSON" in line for line in problems)


def test_only_so_many_problems_are_listed(check: Check) -> None:
    error = refusal(check, [chat_row(1)] + [{"messages": []}] * 300)
    assert "300 problems in 300 of 301 examples" in error.message
    assert "Example 2 (messages): empty" in error.message
    assert "  … and 297 more like these (lines 5, 6, 7," in error.message
    assert len(error.message) < 5000


def test_too_few_examples_are_refused(check: Check) -> None:
    error = refusal(check, chat_rows(9))
    assert "9 examples" in error.message
    assert "at least 10" in error.message
    assert check(chat_rows(10)).examples == 10


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        (["", "  "], "no rows"),
        ([{"text": "a", "label": "b"}] * 12, '{"messages": […]}'),
        (["[1, 2]"] * 12, "a row is an object"),
        (["["], "invalid JSON"),
    ],
)
def test_files_of_another_form_are_refused_with_the_form_that_is_needed(
    check: Check, rows: list[Any], words: str, tmp_path: Path
) -> None:
    error = refusal(check, rows)
    assert error.param == "training_file"
    assert words in error.message
    assert str(tmp_path) not in error.message


def test_a_file_of_the_other_method_is_refused_with_the_form_that_is_needed(check: Check) -> None:
    assert '"preferred_output"' in refusal(check, chat_rows(12), method="dpo").message
    assert "Example 1" in refusal(check, [{"messages": "no list"}] * 12).message


def test_the_validation_file_is_blamed_for_its_own_mistakes(check: Check, tmp_path: Path) -> None:
    error = refusal(check, chat_rows(12), [chat_row(50), {"messages": []}])
    assert error.param == "validation_file"
    assert error.message.startswith("The job failed due to an invalid validation file. ")
    assert "Example 2" in error.message
    assert refusal(check, chat_rows(12), []).param == "validation_file"
    assert str(tmp_path) not in error.message


def test_rows_that_the_template_refuses_or_that_leave_nothing_to_train_are_refused(
    check: Check, tmp_path: Path, quick: dict[str, Any]
) -> None:
    same = refusal(check, chat_rows(12), chat_rows(12))
    assert "validation" in same.message
    assert str(tmp_path) not in same.message
    long = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 200}]}] * 12
    short = {**quick, "data": {"max_length": 32}}
    assert "longer than 32 tokens" in refusal(check, long, defaults=short).message


def test_what_will_be_cut_is_told(check: Check, quick: dict[str, Any]) -> None:
    rows = chat_rows(12)
    rows[0] = {"messages": [{"role": "user", "content": "film " * 90}, {"role": "assistant", "content": "fine"}]}
    facts = check(rows, defaults={**quick, "data": {"max_length": 64}})
    assert any("1 examples are longer than 64 tokens" in text for text in facts.warnings)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_missing_is_said_before_anything_is_queued(check: Check) -> None:
    with pytest.raises(ConfigError, match="wandb is asked for but not installed"):
        check(chat_rows(12), trackers=["wandb"])
