"""The choice of device and dtype, and the memory that a container leaves."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tunery.errors import ConfigError
from tunery.models import device as devices
from tunery.models.device import (
    available_memory,
    bound_kernel_caches,
    describe_device,
    has_bfloat16_instructions,
    matmul_rate,
    peak_memory,
    pick_device,
    probe_precision,
    resolve_dtype,
)

CPU = torch.device("cpu")


def test_a_device_that_is_not_there_is_an_error_and_auto_takes_one_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(ConfigError, match=r"train\.device: there is no cuda device here"):
        pick_device("cuda")
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"


class Processor:
    """Stands in for timed matmuls: a rate for each dtype, and a neighbour that slows some samples down.

    Attributes:
        starved: numbers of the samples, counted from 0, that take 50 times as long.
    """

    def __init__(self, float32: float, bfloat16: float, starved: Sequence[int] = ()) -> None:
        self.rates = {torch.float32: float32, torch.bfloat16: bfloat16}
        self.starved, self.samples, self.tokens = set(starved), 0, list[int]()

    def seconds(self, matmul: Any) -> float:
        self.samples += 1
        self.tokens.append(len(matmul.x))
        slower = 50 if self.samples - 1 in self.starved else 1
        return slower * matmul.flops / self.rates[matmul.dtype]

    def install(self, monkeypatch: pytest.MonkeyPatch, instructions: bool | None = None) -> Processor:
        monkeypatch.setattr(devices._Matmul, "seconds", lambda matmul: self.seconds(matmul))
        monkeypatch.setattr(devices, "has_bfloat16_instructions", lambda: instructions)
        return self


@pytest.mark.parametrize(
    ("bfloat16", "choice", "words"),
    [
        (300e9, torch.bfloat16, "3.0 times as fast as float32"),
        (110e9, torch.float32, "1.1 times as fast as float32"),
        (1e9, torch.float32, "100.0 times slower than float32"),
    ],
)
def test_bfloat16_is_chosen_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bfloat16: float, choice: torch.dtype, words: str
) -> None:
    Processor(100e9, bfloat16).install(monkeypatch)
    probe = probe_precision(CPU)
    assert probe.choice == choice
    assert words in probe.reason
    assert probe.float32_gflops == pytest.approx(100.0)
    assert probe.bfloat16_gflops == pytest.approx(bfloat16 / 1e9)
    assert resolve_dtype("auto", CPU) == (choice, probe)


@pytest.mark.parametrize("seed", range(20))
def test_samples_that_a_neighbour_starves_do_not_choose_the_dtype(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    starved = random.Random(seed).sample(range(20), 12)
    Processor(150e9, 15e9, starved).install(monkeypatch)
    assert probe_precision(CPU).choice == torch.float32
    Processor(150e9, 450e9, starved).install(monkeypatch)
    assert probe_precision(CPU).choice == torch.bfloat16


@pytest.mark.parametrize("starved", [[1], [1, 2], [2, 3, 4]])
def test_a_rate_is_not_read_off_a_moment_in_which_a_neighbour_had_the_cores(
    monkeypatch: pytest.MonkeyPatch, starved: list[int]
) -> None:
    Processor(150e9, 450e9, starved).install(monkeypatch)
    assert matmul_rate(CPU, torch.float32) == pytest.approx(150e9)


def test_a_processor_without_bfloat16_instructions_is_not_asked_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    Processor(1e9, 900e9).install(monkeypatch, instructions=False)  # as beside a neighbour that starves float32
    probe = probe_precision(CPU)
    assert probe.choice == torch.float32
    assert probe.bfloat16_gflops is None
    assert probe.reason == "this processor has no instructions for bfloat16 matmuls"


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu amx_tile amx_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", False),
        ("processor : 0\nFeatures\t: fp asimd sve bf16\n", True),
        ("processor : 0\nFeatures\t: fp asimd\n", False),
        ("processor : 0\n", None),
    ],
)
def test_the_processor_says_whether_it_has_bfloat16_instructions(
    tmp_path: Path, cpuinfo: str, has: bool | None
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert has_bfloat16_instructions(tmp_path / "cpuinfo") is has
    assert has_bfloat16_instructions(tmp_path / "absent") is None


def test_a_named_format_is_taken_without_a_probe() -> None:
    for name in ("float32", "bfloat16", "float64"):
        assert resolve_dtype(name, CPU) == (getattr(torch, name), None)
    with pytest.raises(ConfigError, match="no float64"):
        resolve_dtype("float64", torch.device("mps"))


def test_the_rate_is_measured_and_a_dtype_without_hardware_support_does_not_stall_the_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 1e8 < matmul_rate(CPU, torch.float32, 0.02) < 1e15
    processor = Processor(1e9, 1e9).install(monkeypatch)
    assert math.isclose(matmul_rate(CPU, torch.bfloat16, 0.06), 1e9)
    assert set(processor.tokens) == {64}  # 0.1 s each; the full matmul would take 1.8 s
    assert len(processor.tokens) <= 4
    processor = Processor(150e9, 1e9).install(monkeypatch)
    assert probe_precision(CPU).choice == torch.float32
    assert max(processor.tokens) == 1024
    assert sum(0.1 for tokens in processor.tokens[1::2] if tokens == 64) < 2


def test_the_device_is_described() -> None:
    facts = describe_device(CPU)
    assert facts["kind"] == "cpu"
    assert facts["name"]
    assert facts["threads"] == torch.get_num_threads()
    assert isinstance(facts["memory_bytes"], int)
    assert 0 < available_memory(CPU) <= facts["memory_bytes"]


def test_peak_memory_sees_an_allocation_in_bytes() -> None:
    before = peak_memory(CPU)
    size = before + 100_000_000  # above everything that was ever resident
    block = torch.ones(size // 4)
    assert peak_memory(CPU) >= size * 0.95
    assert peak_memory(CPU) < 3 * size
    del block


def group(folder: Path, limit: str, used: int, cached: int = 0, version: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, used_name, stat = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{stat} {cached}\n")
    return folder


def test_the_tightest_limit_of_all_enclosing_control_groups_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    own.write_text("0::/pod/box\n")
    group(root / "pod", "1000", 700, cached=100)
    group(root / "pod" / "box", "5000", 600)
    assert devices._container_headroom(root, own) == 400
    group(root / "pod" / "box", "max", 600)
    assert devices._container_headroom(root, own) == 400
    group(root / "pod", "max", 700)
    assert devices._container_headroom(root, own) is None


def test_a_limit_is_found_from_inside_a_container_and_in_version_1(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    own.write_text("0::/docker/not-visible-here\n")
    group(root, "900", 200)
    assert devices._container_headroom(root, own) == 700
    own.write_text("11:cpu,cpuacct:/docker/x\n7:memory:/docker/x\n")
    group(root / "memory" / "docker" / "x", "800", 500, cached=50, version=1)
    assert devices._container_headroom(root, own) == 350
    assert devices._container_headroom(root, tmp_path / "absent") is None


def test_the_container_limit_caps_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_container_headroom", lambda: 12_345)
    assert available_memory(CPU) == 12_345


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_described_and_measured() -> None:
    gpu = pick_device("cuda")
    facts = describe_device(gpu)
    assert isinstance(facts["memory_bytes"], int)
    assert 0 < available_memory(gpu) <= facts["memory_bytes"]
    before = peak_memory(gpu)
    block = torch.ones(1 << 20, device=gpu)
    assert peak_memory(gpu) >= before
    assert matmul_rate(gpu, torch.float32) > 1e11
    assert probe_precision(gpu).choice in (torch.float32, torch.bfloat16)
    del block


def test_memory_of_compiled_kernels_is_bounded_unless_the_person_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2000")
    bound_kernel_caches()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "2000"
    assert 0 < int(os.environ["LRU_CACHE_CAPACITY"]) <= 128
