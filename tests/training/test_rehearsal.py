"""An estimate of time is a range, from steps of the task's own, and says what it was told from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tunery
from tests.support.films import write_films
from tunery.api import check_local
from tunery.models.load import load_config, random_model
from tunery.task_file import load_task
from tunery.training import rehearsal


@pytest.fixture
def project(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_films(tmp_path, base_folder)


def planned(*overrides: str) -> Any:
    return tunery.check("task.yaml", overrides)["training"]


def test_the_range_spans_the_timed_steps_and_a_warm_up_does_not_count(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([9.0, 0.2, 0.1, 0.4])
    monkeypatch.setattr(rehearsal, "SECONDS", 9.6)
    monkeypatch.setattr(rehearsal, "_seconds_of", lambda step: step() or next(seconds))
    found = planned("train.precision=float32")
    fastest = found.seconds_low / rehearsal.FASTER
    assert found.seconds / fastest == pytest.approx(2)
    assert found.seconds_high / rehearsal.SLOWER / fastest == pytest.approx(4)
    assert found.seconds_basis.startswith("3 steps of 2 layers, timed")


def test_a_matmul_rate_taken_at_a_bad_moment_does_not_tell_the_time(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "matmul_rate", lambda *_: 1e3)
    found = planned()
    assert found.seconds_high < found.flops / (rehearsal.USUAL * 1e3) / 100


@pytest.mark.parametrize("setting", ["most", "targets"])
def test_where_no_step_can_be_timed_the_matmul_rate_gives_a_wide_range(
    project: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr(rehearsal, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(rehearsal, *(("MOST_WEIGHTS", 10) if setting == "most" else ("LAYERS", 1)))
    found = planned("lora.targets=layers.1.mlp.up_proj")
    least, most = rehearsal.FRACTIONS
    assert found.seconds_low == pytest.approx(found.flops / (most * 1e9))
    assert found.seconds_high == pytest.approx(found.flops / (least * 1e9))
    assert "15% to 80% of the rate that matmuls reach" in found.seconds_basis


def test_a_server_that_answers_meanwhile_times_no_steps(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "random_model", None)
    assert "matmuls" in check_local(load_task("task.yaml")).training.seconds_basis


def test_the_rehearsal_leaves_no_trace_in_random_numbers(base_folder: Path) -> None:
    before = torch.random.get_rng_state()
    model = random_model(load_config(str(base_folder)), 1, torch.float32, most=10**9)
    assert model is not None
    assert len(model.model.layers) == 1
    assert torch.equal(before, torch.random.get_rng_state())
    assert random_model(load_config(str(base_folder)), 1, torch.float32, most=10) is None
