"""metrics.jsonl survives crashes, and trackers never stop a run."""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from tunery.errors import CheckpointError, ConfigError
from tunery.training.metrics import MetricsWriter, open_sinks, read_metrics
from tunery.versions import install_command


def test_each_line_is_on_disk_at_once(tmp_path: Path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path, keep_until_step=None) as writer:
        writer.write({"step": 1, "train_loss": 2.5})
        assert read_metrics(path) == [{"step": 1, "train_loss": 2.5}]
        writer.write({"step": 2, "train_loss": 2.25})
        assert len(read_metrics(path)) == 2


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, keep_until_step=None) as writer:
        for step in range(1, 6):
            writer.write({"step": step})
    with MetricsWriter(path, keep_until_step=3) as writer:
        writer.write({"step": 4, "again": True})
    assert [(line["step"], "again" in line) for line in read_metrics(path)] == [
        (1, False),
        (2, False),
        (3, False),
        (4, True),
    ]


def test_zero_starts_afresh_and_none_keeps_all(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsWriter(path, keep_until_step=None).close()
    assert read_metrics(path) == [{"step": 1}]
    MetricsWriter(path, keep_until_step=0).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("torn", [b'{"step": 3, "train', b"\x00\x00\x00", b'{"step": 3, "name": "\xc3'])
def test_a_last_line_torn_by_a_crash_is_passed_over_and_mended(tmp_path: Path, torn: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    with MetricsWriter(path, keep_until_step=None) as writer:
        writer.write({"step": 3})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_no_file_is_no_lines(tmp_path: Path):
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_leave_no_trace(tmp_path: Path, value: float):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, keep_until_step=None) as writer:
        with pytest.raises(ValueError, match="train_loss at step 7"):
            writer.write({"step": 7, "train_loss": value})
        writer.write({"step": 8, "train_loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [8]


# --------------------------------------------------------------------------- trackers


class FakeTracker(types.ModuleType):
    """Stands in for wandb and trackio, which share these calls."""

    def __init__(self, name: str, fail: str = ""):
        super().__init__(name)
        self.fail, self.logged, self.finished, self.settings = fail, [], False, {}

    def init(self, **settings: Any) -> FakeTracker:
        print("hello from the tracker")  # noqa: T201
        if self.fail == "init":
            raise RuntimeError("not logged in")
        self.settings = settings
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self.fail == "log":
            raise OSError("network is down")
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_numbers_only_and_is_closed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    tracker = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    (sink,) = open_sinks([name], "my-run", {"lora": {"rank": 8}}, tmp_path)
    sink.log(3, {"step": 3, "train_loss": 1.5, "note": "text", "nothing": None})
    sink.close()
    assert tracker.settings["project"] == "tunery"
    assert tracker.settings["name"] == "my-run"
    assert tracker.settings["config"] == {"lora": {"rank": 8}}
    assert tracker.logged == [(3, {"train_loss": 1.5})]
    assert tracker.finished
    assert capsys.readouterr().out == ""  # stdout is for results


def test_a_missing_package_is_an_error_before_anything_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = FakeTracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", there)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        open_sinks(["trackio", "wandb"], "r", {}, tmp_path)
    assert caught.value.hint == install_command("wandb")
    assert there.settings == {}


def test_a_tracker_that_cannot_be_opened_is_an_error_and_closes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    there = FakeTracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", there)
    monkeypatch.setitem(sys.modules, "wandb", FakeTracker("wandb", "init"))
    with pytest.raises(ConfigError, match="not logged in"):
        open_sinks(["trackio", "wandb"], "r", {}, tmp_path)
    assert there.finished


def test_an_unknown_tracker_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="mlflow"):
        open_sinks(["mlflow"], "r", {}, tmp_path)


def test_a_tracker_that_fails_while_training_warns_once_and_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", FakeTracker("wandb", "log"))
    (sink,) = open_sinks(["wandb"], "r", {}, tmp_path)
    with pytest.warns(RuntimeWarning, match=r"wandb failed .*network is down"):
        sink.log(1, {"train_loss": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink.log(2, {"train_loss": 1.0})
        sink.close()


def test_tensorboard_writes_into_the_run_directory(tmp_path: Path):
    pytest.importorskip("tensorboard")
    (sink,) = open_sinks(["tensorboard"], "r", {}, tmp_path)
    sink.log(1, {"train_loss": 1.0})
    sink.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
