"""An export's folder: which may be replaced, and that nothing half written stays."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tunery
from tests.export.runs import QUIET
from tunery import paths
from tunery.errors import ConfigError, ResumableError, TuneryError
from tunery.export.export_run import RECORD, check_folder, sweep, write_export
from tunery.export.subject import memory_errors, place_with_room
from tunery.export.targets import TARGETS


@pytest.mark.parametrize("out", [".", "..", "inside/.."])
def test_the_folder_one_is_in_is_not_replaced(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="the folder you are in"):
        check_folder(Path(out).resolve(), tmp_path / "run")


def test_an_out_of_one_dot_is_told(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="the folder you are in"):
        tunery.export_run(run_of("llama"), "merged", out=".", device="cpu", progress=QUIET)


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [(errno.ENOSPC, ResumableError, "nothing of it is kept"), (errno.EACCES, ConfigError, "--out")],
)
def test_what_to_do_about_a_disk(number: int, kind: type[TuneryError], hint: str, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with paths.disk_errors("a file in it"):
            raise OSError(number, "no")

    with pytest.raises(kind) as caught:
        write_export(tmp_path / "out", fill)
    assert hint in str(caught.value.hint)
    assert "checkpoint" not in str(caught.value)
    assert "--set" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_earlier_folder_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".tmp-" in source.name:
            raise OSError(errno.EIO, "no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        paths.write_folder(tmp_path / "out", lambda folder: (folder / "new").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "old").exists()


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_what_killed_exports_left_is_removed(tmp_path: Path) -> None:
    dead = dead_process()
    for name in (f".out.tmp-{dead}", f".out.old-{dead}", f".out.tmp-{os.getpid()}", f".other.tmp-{dead}", "out"):
        (tmp_path / name).mkdir()
    sweep(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out", f".out.tmp-{os.getpid()}", f".other.tmp-{dead}"}


def test_an_export_that_had_made_way_gets_its_name_back(tmp_path: Path) -> None:
    retired = tmp_path / f".out.old-{dead_process()}"
    retired.mkdir()
    (retired / RECORD).touch()
    sweep(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / RECORD).exists()


TERMINATED = """
import sys, time
from pathlib import Path
from tunery.errors import StoppedError
from tunery.export.export_run import terminable, write_export

def fill(folder):
    (folder / "part").write_bytes(bytes(1000))
    print("writing", flush=True)
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # as some libraries do
            pass

try:
    with terminable():
        write_export(Path(sys.argv[1]), fill)
except StoppedError as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_nothing_stays_of_an_export_that_is_terminated(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", TERMINATED, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not list(tmp_path.iterdir())


def test_an_export_is_terminable(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> list[str]:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(10)
        return []

    monkeypatch.setattr(TARGETS["merged"], "write", write)
    with pytest.raises(TuneryError, match="terminated") as caught:
        tunery.export_run(run_of("llama"), "merged", out=tmp_path / "out", device="cpu", progress=QUIET)
    assert caught.value.exit_code == 143
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_gpu_without_room_leaves_the_models_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 10, "cpu": 1000}
    monkeypatch.setattr("tunery.export.subject.available_memory", lambda device: free[device.type])
    monkeypatch.setattr(
        "tunery.export.subject.pick_device", lambda name: torch.device("cuda" if name == "auto" else name)
    )
    assert place_with_room("auto", 5) == "cuda"
    assert place_with_room("auto", 500) == "cpu"
    with pytest.raises(ConfigError) as caught:
        place_with_room("cuda", 500)
    assert "--device cpu" in str(caught.value.hint)
    with pytest.raises(ConfigError) as caught:
        place_with_room("auto", 5000)
    assert "--device" not in str(caught.value.hint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="there is no cuda device") as caught:
        place_with_room("cuda", 5)
    assert caught.value.hint == "use --device auto"


def test_memory_that_runs_out_is_no_bug() -> None:
    with pytest.raises(ConfigError) as caught, memory_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "--device cpu" in str(caught.value.hint)
