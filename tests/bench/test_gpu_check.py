"""The GPU check, rehearsed on a CPU: every part says what it is to say, and none takes another with it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.gpu_check.__main__ import PARTS
from bench.gpu_check.check import Check
from bench.gpu_check.small import ROWS, SHARED, Repeated, short_rows
from bench.gpu_check.trainer import random_llama, random_rows, trainer_of
from torch import Tensor

from bench import plan
from tunery.data.batching import flatten
from tunery.training.loss import batch_loss

QUICK = ("facts", "lora", "attention", "islands", "small")
SLOW = tuple(part for part in PARTS if part not in QUICK)
Line = dict[str, Any]


def environment(out: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(plan.ROOT / "src"), str(plan.ROOT)])
    return {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


pytestmark = pytest.mark.timeout(400)  # each part has its own limit


def results(out: Path) -> list[Line]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def rehearsed(parts: Sequence[str], out: Path) -> list[Line]:
    """The lines of some parts, measured in one process; none says that something failed."""
    command = [sys.executable, "-m", "bench.gpu_check", *parts, "--tiny"]
    done = subprocess.run(
        command, cwd=plan.ROOT, env=environment(out), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = results(out)
    assert [line for line in lines if "failed" in line] == []
    assert [line["what"] for line in lines if line["part"] == "done"] == list(parts)
    return lines


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    return rehearsed(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    return rehearsed(SLOW, tmp_path_factory.mktemp("slow"))


def of(lines: Sequence[Line], part: str) -> list[Line]:
    return [line for line in lines if line["part"] == part]


def check_step(line: Line, rows: int) -> None:
    """A step's line: measured, learning from random rows, nothing refused."""
    assert line["rows"] == rows
    assert line["computed_tokens_s"] > 0
    assert 0 < line["ms"] <= max(line["all_ms"])
    assert 0 < line["tflops"] < 10
    assert line["share"] > 0
    assert abs(line["loss"] - 6.24) < 0.2, "ln 512: as good as guessing"
    assert line["norm"] > 0
    assert line["refusals"] == []


# --------------------------------------------------------------------------- parts


def test_facts(quick: list[Line]) -> None:
    (facts,) = of(quick, "facts")
    assert facts["torch"] == torch.__version__
    products = of(quick, "product")
    assert products[0]["mkn"] == [8192, 8192, 8192]
    assert len(products) == 12
    assert all(line["tflops"] > 0 for line in [*products, *of(quick, "tunery's own rate")])
    assert of(quick, "copy")[0]["TB_s"] > 0


def test_lora_ways(quick: list[Line]) -> None:
    lines = of(quick, "lora")
    ways = {"product alone", "in place", "out of place", "further columns", "A x", "dB", "thin"}
    for layer in ("q, k, v", "gate and up", "down"):
        assert {line["way"] for line in lines if line["layer"] == layer} == ways
    assert all(line["ms"] > 0 for line in lines)


def test_attention(quick: list[Line]) -> None:
    lines = of(quick, "attention")
    found = {(line["way"], line["shared"] > 0) for line in lines}
    assert found == {("flex", False), ("flex", True), ("sdpa math", False)}
    assert all(line["forward_ms"] > 0 and line["heads"] == [4, 2, 16] for line in lines)


def test_islands(quick: list[Line]) -> None:
    lines = of(quick, "island")
    assert len(lines) == 10
    assert all(line["eager_ms"] > 0 for line in lines)
    measured = [line for line in lines if "off" in line]
    assert len(measured) == 8
    assert all(0 < line["off"] < 0.005 for line in measured), "bfloat16 rounds to 0.4 %"


def test_small(quick: list[Line]) -> None:
    (step,), (host,), (graph,) = (of(quick, part) for part in ("step, 135m", "host", "graph"))
    check_step(step, ROWS)
    assert (host["shape"], host["rows"]) == ("135m", ROWS)
    assert host["forward_ms"] > 0
    assert graph["tokens"] < SHARED + ROWS * 40, "the shared tokens once"
    assert graph["eager_ms"] > 0
    assert "replay_ms" not in graph, "there are no graphs on a CPU"


@pytest.mark.slow
def test_step(slow: list[Line]) -> None:
    assert {line["shape"] for line in of(slow, "build")} == {"8b", "70b nf4"}
    (inspection,) = of(slow, "adapter and inspection")
    assert inspection["flattened"]
    assert inspection["last_layer"]
    for line, rows in zip(of(slow, "step"), (4, 1, 16), strict=True):
        check_step(line, rows)
    for line, rows in zip(of(slow, "step, recomputing"), (2, 4), strict=True):
        check_step(line, rows)
    (shared,) = of(slow, "step, half of each row shared")
    check_step(shared, 16)
    assert shared["computed_tokens_s"] < 0.6 * shared["data_tokens_s"]
    assert len(of(slow, "host")) == 1


@pytest.mark.slow
def test_eager(slow: list[Line]) -> None:
    for line, rows in zip(of(slow, "step, eager"), (4, 1), strict=True):
        check_step(line, rows)


@pytest.mark.slow
def test_nf4(slow: list[Line]) -> None:
    pytest.importorskip("bitsandbytes")
    for part in ("nf4, kept", "nf4, recomputing"):
        (line,) = of(slow, part)
        check_step(line, 1)


@pytest.mark.slow
def test_recovery(slow: list[Line]) -> None:
    assert of(slow, "resume")[0]["same"] is True
    (line,) = of(slow, "out of memory")
    assert (line["halvings"], line["rows"], line["gradient_differs"]) == (0, 8, 0.0), "a rehearsal has memory enough"
    assert line["loss"][0] == line["loss"][1]


@pytest.mark.slow
def test_peer(tmp_path: Path) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("needs TRL, which `make gpu-site` brings to the GPU machine")
    command = [sys.executable, "-m", "bench.gpu_check.peer", "--tiny"]
    done = subprocess.run(
        command, cwd=plan.ROOT, env=environment(tmp_path), input="go\n" * 9, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["ready", *["step"] * 5]
    assert all(line["data_tokens"] == 4 * 96 and line["trained_tokens"] == 4 * 95 for line in lines[1:])


# --------------------------------------------------------------------------- one that fails


def test_a_failure_is_a_result_and_the_rest_goes_on(tmp_path: Path) -> None:
    check = Check(True, tmp_path)

    def fails() -> None:
        raise RuntimeError("no kernel image is available")

    assert check.attempt("attention", fails) is None
    assert check.attempt("attention", lambda: 7) == 7
    check.say("attention", way="flex")
    first, second = results(tmp_path)
    assert (first["part"], first["failed"]) == ("attention", "RuntimeError: no kernel image is available")
    assert second["way"] == "flex"


def test_the_script_measures_each_part_in_a_process_of_its_own(tmp_path: Path) -> None:
    given = {**environment(tmp_path), "TINY": "--tiny", "PARTS": "unknown lora facts", "BUDGET": "300"}
    script = plan.ROOT / "bench" / "gpu_check.sh"
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=given, capture_output=True, text=True, timeout=300, check=False
    )
    assert "== unknown: rc 2," in done.stdout, done.stdout + done.stderr
    assert "== lora: rc 0," in done.stdout
    assert "== facts: rc 0," in done.stdout
    lines = results(tmp_path)
    assert [line["what"] for line in lines if line["part"] == "done"] == ["lora", "facts"]
    assert not [line for line in lines if "failed" in line]
    assert "invalid choice: 'unknown'" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    shown = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(shown) == len(lines)


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path) -> None:
    given = {**environment(tmp_path), "TINY": "--tiny", "PARTS": "facts", "BUDGET": "19"}
    script = plan.ROOT / "bench" / "gpu_check.sh"
    done = subprocess.run(["bash", str(script)], env=given, capture_output=True, text=True, timeout=60, check=True)
    assert "facts: no time left" in done.stdout
    assert results(tmp_path) == []


# --------------------------------------------------------------------------- what is measured is right


def test_a_model_that_repeats_a_batch_copies_it_once_and_gives_the_same_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(True, tmp_path)
    trainer = trainer_of(random_llama(check, check.shape("135m")).double())
    batch, parameters = flatten(short_rows(check, 0)), list(trainer.adapter.values())

    def gradient(model: Any) -> list[Tensor]:
        with model.running():
            return list(torch.autograd.grad(batch_loss(model, batch).total, parameters))

    wanted = gradient(trainer.model)
    repeated = Repeated(**{name: getattr(trainer.model, name) for name in trainer.model.__dataclass_fields__})
    gradient(repeated)
    monkeypatch.setattr("tunery.fast.packed_model.on_device", pytest.fail)
    again = gradient(repeated)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(again, wanted, strict=True))


def test_random_rows(tmp_path: Path) -> None:
    check = Check(True, tmp_path)
    a, b = random_rows(check, 2, shared=20)
    assert (a.ids[:20] == b.ids[:20]).all()
    assert (a.ids[20:] != b.ids[20:]).any()
    assert (len(a.ids), a.trained) == (96, 76)
    (alone,) = random_rows(check, 1)
    assert alone.trained == 95, "the first token is predicted from nothing"
    assert {(len(row.ids), row.trained) for row in short_rows(check, 3)} == {(80, 2)}
