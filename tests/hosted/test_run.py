"""A hosted run from a task file to a run directory: agreed to, followed, taken up again, and never doubled."""

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
from tests.hosted.fake import KEY, MODEL, Failure, Fake
from tunery import api
from tunery.errors import ConfigError, DataError, HostedError, ResumableError, StoppedError

RUN = Path("runs/films")


def yes(sentences: Sequence[str]) -> bool:
    return True


def train(progress: Watching | None = None, overrides: Sequence[str] = (), **more: Any) -> tunery.Run:
    return tunery.train("task.yaml", overrides, progress=progress or Watching(), consent=yes, **more)


def read(name: str) -> Any:
    return json.loads((RUN / name).read_text())


def test_a_run_directory_is_complete_and_tells_what_was_trained(project: Path, fake: Fake) -> None:
    progress = Watching()
    run = train(progress)
    assert run.path == RUN
    assert {"task.yaml", "metrics.jsonl", "evaluation.json", "receipt.json", "report.html", "hosted.json"} <= {
        path.name for path in RUN.iterdir()
    }
    assert run.evaluation is not None
    assert run.evaluation["rows"] == 8
    assert run.evaluation["tuned"]["accuracy"] == 1.0
    assert run.evaluation["base"]["accuracy"] == 0.5, "it always finds them good"
    receipt = run.receipt
    assert receipt["data"]["train_rows"] == 32
    assert receipt["hosted"]["tuned_model"].startswith(f"ft:{MODEL}")
    assert receipt["hosted"]["billed_tokens"] == receipt["tokens"]["estimated"]
    assert receipt["training"]["learning_rate_multiplier"] == 1.8, "what the server settled on"
    assert (receipt["training"]["steps"], receipt["training"]["first_loss"]) == (8, 1.0)
    assert receipt["training"]["best_valid_loss"] == 0.25
    assert progress.started == (8, 1)
    assert progress.closed
    assert [line["step"] for line in progress.lines if "train_loss" in line] == list(range(1, 9))
    assert "Created fine-tuning job: " in " ".join(progress.said)
    assert not any(said.startswith("Step ") for said in progress.said)
    sent = [json.loads(line) for line in (RUN / "sent" / "training.jsonl").read_text().splitlines()]
    assert len(sent) == 32
    assert fake.content[receipt["hosted"]["files"]["training"]["id"]] == (RUN / "sent" / "training.jsonl").read_bytes()


def test_the_job_is_as_the_task_says(project: Path, fake: Fake) -> None:
    train(overrides=["train.learning_rate_multiplier=0.5", "seed=3", "hosted.suffix=reviews"])
    (job,) = fake.jobs.values()
    assert job["method"] == {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 0.5}},
    }
    assert (job["seed"], job["suffix"], job["model"]) == (3, "reviews", MODEL)
    assert job["validation_file"] in fake.files


def test_nothing_is_sent_without_consent(project: Path, fake: Fake) -> None:
    shown: list[str] = []

    def no(sentences: Sequence[str]) -> bool:
        shown.extend(sentences)
        return False

    with pytest.raises(ConfigError, match="nothing was sent"):
        tunery.train("task.yaml", progress=Watching(), consent=no)
    with pytest.raises(ConfigError, match="nobody could be asked") as stopped:
        tunery.train("task.yaml", progress=Watching())
    assert "--yes" in str(stopped.value)
    text = "\n".join(shown)
    for words in (fake.address, "32 training rows", "8 validation rows", "n_epochs 2", "1,216 tokens", "8 questions"):
        assert words in text
    assert fake.requests == []
    assert not RUN.exists()


def test_the_cost_is_told_where_prices_are_known(project: Path, fake: Fake) -> None:
    (project / "prices.toml").write_text(f'[models."{MODEL}"]\ntraining = 1000\ninput = 1\noutput = 1\n')
    (project / "task.yaml").write_text((project / "task.yaml").read_text() + "hosted:\n  prices: prices.toml\n")
    found = tunery.check("task.yaml")
    assert found["hosted"]["estimate"]["training_cost"] == pytest.approx(1.216)
    assert found["hosted"]["estimate"]["cost"] is None, "the tuned model's answers have no price"
    (project / "prices.toml").write_text(
        f'[models."{MODEL}"]\ntraining = 1000\ninput = 1\noutput = 1\ntuned_input = 2\ntuned_output = 2\n'
    )
    assert tunery.check("task.yaml")["hosted"]["estimate"]["cost"] == pytest.approx(1.2164, abs=1e-4)
    assert fake.requests == []


def test_a_run_that_is_interrupted_goes_on_where_it_was(project: Path, fake: Fake) -> None:
    class Interrupting(Watching):
        def log(self, line: Any) -> None:
            super().log(line)
            if len(self.lines) == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError, match="continues at") as stopped:
        train(Interrupting())
    assert stopped.value.exit_code == 130
    assert "--cancel" in str(stopped.value)
    assert not (RUN / "receipt.json").exists()
    progress = Watching()
    again = tunery.train("task.yaml", progress=progress)  # agreed to before
    assert len(fake.jobs) == 1
    assert again.receipt["training"]["steps"] == 8
    steps = [line["step"] for line in map(json.loads, (RUN / "metrics.jsonl").read_text().splitlines())]
    assert steps == [*range(1, 9), 8]
    assert "Created fine-tuning job" not in " ".join(progress.said), "told before"


@pytest.mark.parametrize(
    ("method", "path", "skip"),
    [
        ("POST", "/fine_tuning/jobs$", 0),
        ("POST", "/files$", 0),
        ("POST", "/files$", 1),
        ("POST", "/fine_tuning/jobs$", 1),
        ("GET", "/events", 0),
        ("GET", "/events", 3),
        ("GET", "/content", 0),
        ("POST", "/chat", 0),
        ("POST", "/chat", 11),
    ],
    ids=lambda value: str(value),
)
def test_a_run_that_fails_anywhere_is_taken_up_by_the_same_command(
    project: Path, fake: Fake, method: str, path: str, skip: int
) -> None:
    fake.failures.append(Failure(method, path, skip=skip, status=429, code="insufficient_quota"))
    with pytest.raises(ResumableError, match="no credit left"):
        train()
    run = train()
    assert len(fake.jobs) == 1
    assert run.evaluation is not None
    assert run.evaluation["tuned"]["accuracy"] == 1.0
    assert len(fake.asked) == 16


def test_a_finished_run_is_not_trained_again(project: Path, fake: Fake) -> None:
    train()
    before, requests = (RUN / "receipt.json").read_text(), len(fake.requests)
    progress = Watching()
    again = tunery.train("task.yaml", progress=progress)
    assert (RUN / "receipt.json").read_text() == before
    assert again.evaluation == read("evaluation.json")
    assert len(fake.requests) == requests
    assert "already finished" in progress.said[-1]


def test_another_evaluation_asks_only_what_is_missing(project: Path, fake: Fake) -> None:
    train(overrides=["evaluate.max_rows=3"])
    assert len(fake.asked) == 6
    with pytest.raises(ConfigError, match=r"5 questions to gpt-4\.1-mini"):
        tunery.train("task.yaml", progress=Watching())
    run = train()
    assert len(fake.asked) == 16
    assert run.evaluation is not None
    assert run.evaluation["rows"] == 8
    result = api.evaluate(RUN, progress=Watching())
    assert len(fake.asked) == 16
    assert result["tuned"] == run.evaluation["tuned"]
    (project / "more.csv").write_text("text,label\nfilm 99 is fine,good\nfilm 98 is dull,bad\n")
    more = api.evaluate(RUN, "more.csv", progress=Watching(), consent=yes)
    assert (more["rows"], more["tuned"]["accuracy"]) == (2, 1.0)
    assert (RUN / "evaluation-more.json").exists()
    kept = [json.loads(line) for line in (RUN / "predictions.jsonl").read_text().splitlines()]
    assert len(kept) == 8
    assert {row["expected"] for row in kept} == {"good", "bad"}
    others = [json.loads(line) for line in (RUN / "predictions-more.jsonl").read_text().splitlines()]
    assert [row["tuned"] for row in others] == ["good", "bad"]


def test_other_rows_or_settings_are_refused(project: Path, fake: Fake) -> None:
    train()
    with pytest.raises(ConfigError, match=r"method: .*n_epochs"):
        train(overrides=["train.epochs=3"])
    rows = (project / "rows.csv").read_text()
    (project / "rows.csv").write_text(rows.replace("dull", "grey"))
    with pytest.raises(ConfigError, match="the training rows; the validation rows"):
        train()
    with pytest.raises(DataError, match="the training rows and the validation rows have changed"):
        api.evaluate(RUN, progress=Watching(), consent=yes)
    train(resume="never")
    assert len(fake.jobs) == 2
    assert (Path("runs") / "films.old-1" / "receipt.json").exists()


def test_a_job_that_fails_for_its_rows_names_ours_and_can_be_made_again(project: Path, fake: Fake) -> None:
    fake.statuses = ("validating_files", "failed")
    message = "The job failed due to an invalid training file. Example 3, message 2: unexpected weight"
    fake.error = {"code": "invalid_training_file", "message": message, "param": "training_file"}
    with pytest.raises(DataError, match="Example 3") as stopped:
        train()
    third = json.loads((RUN / "sent" / "training.jsonl").read_text().splitlines()[2])["messages"][0]["content"]
    number = int(third.split("film ")[1].split()[0])
    assert f"rows.csv:{number + 2}" in str(stopped.value), "the line in our file"
    fake.statuses = ("queued", "running", "running", "succeeded")
    run = train()
    assert len(fake.jobs) == 2
    assert run.receipt["hosted"]["earlier_jobs"][0]["status"] == "failed"
    assert "1 earlier job of this run did not succeed" in run.receipt["warnings"]
    assert json.loads((RUN / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_job_that_fails_for_the_servers_reasons_says_so(project: Path, fake: Fake) -> None:
    fake.statuses, fake.error = ("running", "failed"), {"code": "server_error", "message": "out of luck", "param": None}
    with pytest.raises(HostedError, match=r"failed: out of luck \(server_error\)") as stopped:
        train()
    assert stopped.value.exit_code == 69


def test_a_job_is_cancelled_on_request(project: Path, fake: Fake) -> None:
    with pytest.raises(ConfigError, match="no job to cancel"):
        api.cancel("task.yaml", progress=Watching())
    fake.failures.append(Failure("GET", "/events", status=401))
    with pytest.raises(ConfigError):
        train()
    assert api.cancel("task.yaml", progress=Watching()).endswith(": cancelled")
    assert [job["status"] for job in fake.jobs.values()] == ["cancelled"]


def test_closed_training_is_told_before_a_row_is_sent(project: Path, fake: Fake) -> None:
    fake.failures.append(Failure("POST", "/fine_tuning/jobs", status=403, code="training_not_available"))
    with pytest.raises(HostedError, match=r"2027-01-14[\s\S]*smollm2-135m-instruct[\s\S]*tunery migrate"):
        train()
    assert fake.files == {}
    assert not RUN.exists()


def test_a_run_trained_here_and_a_hosted_one_do_not_share_a_folder(project: Path, fake: Fake) -> None:
    (RUN / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="trained here"):
        train()
    (RUN / "checkpoints").rmdir()
    train()
    with pytest.raises(ConfigError, match="trained elsewhere"):
        tunery.train("task.yaml", ["model=smollm2-135m-instruct"], progress=Watching())
    with pytest.raises(ConfigError, match="was trained elsewhere: ft:"):
        tunery.load(RUN)
    with pytest.raises(ConfigError, match="no checkpoints here"):
        train(resume="runs/films/checkpoints/step-1")
    with pytest.raises(ConfigError, match="cannot be tried out here"):
        api.learning_rate_test("task.yaml")


def test_the_key_is_written_nowhere(project: Path, fake: Fake) -> None:
    progress = Watching()
    train(progress)
    for path in project.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "\n".join(progress.said)


def test_other_kinds_are_trained_and_evaluated(project: Path, fake: Fake) -> None:
    fake.answer = lambda model, asked: f"an answer to {asked}" if model.startswith("ft:") else "hm"
    user, assistant = ({"role": role} for role in ("user", "assistant"))

    def row(kind: str, i: int) -> dict[str, Any]:
        asked, answer = f"question {i}", f"an answer to question {i}"
        if kind == "chat":
            return {"messages": [{**user, "content": asked}, {**assistant, "content": answer}]}
        if kind == "preference":
            return {"prompt": asked, "chosen": answer, "rejected": f"{i}"}
        return {"prompt": asked, "completion": answer}

    for kind in ("completion", "chat", "preference"):
        (project / "rows.jsonl").write_text("".join(json.dumps(row(kind, i)) + "\n" for i in range(20)))
        task = f"name: {kind}\nmodel: openai:{MODEL}\ndata:\n  train: rows.jsonl\n  validation: 5\n"
        (project / "task.yaml").write_text(task)
        run = train()
        assert run.evaluation is not None
        assert run.evaluation["kind"] == kind
        assert run.evaluation["tuned"]["chrf"] > 99 > run.evaluation["base"]["chrf"]
        page = (run.path / "report.html").read_text()
        assert "overlap with the reference by 100.0 of 100 points" in page
        job = list(fake.jobs.values())[-1]
        assert job["method"]["type"] == ("dpo" if kind == "preference" else "supervised")


def test_a_job_that_a_server_describes_in_its_own_way_is_told_and_not_lost(project: Path, fake: Fake) -> None:
    train()
    (RUN / "receipt.json").unlink()
    (job,) = fake.jobs.values()
    tokens, job["trained_tokens"] = job["trained_tokens"], "many"
    with pytest.raises(HostedError, match=r"describes it in a form.*tokens\.data") as stopped:
        train()
    assert f"the model is trained: {job['fine_tuned_model']}" in str(stopped.value)
    job["trained_tokens"] = tokens
    assert train().receipt["tokens"]["data"] == tokens
    assert len(fake.jobs) == 1
