"""Processes that work in turn, and the environments they run in."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from bench.measure import compare, together
from bench.peers import common

from bench import environments, plan

PEER = """
import sys
from bench.peers.common import Lines
lines = Lines()
print("a library prints this")
lines.ready("numpy", trainable=5)
for number in range(9):
    lines.wait()
    if number == {dies}:
        sys.exit("out of ideas")
    with open(sys.argv[1] + "/order", "a") as file:
        file.write("{name}")
    lines.step(number, 0.5, 2.0 - number, 10, 3)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with peers "a", which works, and "b", which gives up at its third step."""
    peers = tmp_path / "bench" / "peers"
    peers.mkdir(parents=True)
    (tmp_path / "bench" / "__init__.py").touch()
    (peers / "__init__.py").touch()
    shutil.copy(common.__file__, peers / "common.py")
    for name, dies in (("a", 99), ("b", 2)):
        (peers / f"{name}.py").write_text(PEER.format(name=name, dies=dies), encoding="utf-8")
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    monkeypatch.setattr(plan, "TUNERY", plan.Peer("a", "A", "", "a"))
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_two_peers_take_turns(folder: Path) -> None:
    record = compare(plan.Peer("b", "B", "", "b"), folder, 1, 1)
    assert (folder / "order").read_text() == "abab"
    assert [step["loss"] for step in record["tunery"]["steps"]] == [2.0, 1.0]
    assert record["other"]["versions"]["numpy"]
    assert record["other"]["startup_seconds"] > 0
    assert all(step["peak_bytes"] > 10**6 for step in record["other"]["steps"])


def test_one_that_dies_says_why_and_the_other_goes_on(folder: Path) -> None:
    record = compare(plan.Peer("b", "B", "", "b"), folder, 1, 3)
    assert len(record["tunery"]["steps"]) == 4
    assert record["other"]["failed"] == "ended with code 1: out of ideas"
    assert "a library prints this" in (folder / "b.log").read_text()


def test_one_that_cannot_start_says_why(folder: Path) -> None:
    (run,) = together([plan.Peer("c", "C", "", "missing")], folder, 1, 1)
    assert "No module named" in run["failed"]


def test_tunery_alone(folder: Path) -> None:
    assert compare(None, folder, 1, 1)["other"] is None
    assert (folder / "order").read_text() == "aa"


def test_an_environment_is_built_again_only_when_its_pins_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(environments, "FOLDER", tmp_path / ".venv-bench")
    monkeypatch.setattr(environments, "PINS", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "_run", lambda command: commands.append(command))
    (tmp_path / ".venv-bench" / "x").mkdir(parents=True)
    pins = tmp_path / "x.txt"
    pins.write_text("torch==2.13.0\n")
    for _ in range(2):
        assert environments.python_of("x").startswith(str(tmp_path / ".venv-bench" / "x"))
    assert len(commands) == 2, "one to make it, one to install"
    pins.write_text("torch==2.13.1\n")
    environments.python_of("x")
    assert len(commands) == 4
    assert environments.python_of("") == sys.executable


def test_a_package_that_does_not_load_is_taken_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(environments, "FOLDER", tmp_path / ".venv-bench")
    monkeypatch.setattr(environments, "PINS", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "SPARE", {"x": ("json", "broken")})
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "broken.py").write_text("raise RuntimeError('operator does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(packages))

    def run(command: list[str]) -> None:
        commands.append(command)
        if "venv" in command:
            binaries = Path(command[-1]) / "bin"
            binaries.mkdir(parents=True)
            (binaries / "python").symlink_to(sys.executable)

    monkeypatch.setattr(environments, "_run", run)
    for name in "xy":
        (tmp_path / f"{name}.txt").write_text("torch==2.13.0\n")
        environments.python_of(name)
    removed = [command for command in commands if "uninstall" in command]
    assert [(Path(command[0]).parts[-3], command[-1]) for command in removed] == [("x", "broken")]


def test_what_pip_cannot_install_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    no_such_version = "ERROR: Could not find a version that satisfies the requirement torch==9 (from versions: 2.13.0)"
    no_index = "ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)"
    why = no_such_version

    def run(command: list[str]) -> None:
        commands.append(command)
        if "pip" in command:
            raise environments.EnvironmentFailed(why)

    monkeypatch.setattr(environments, "FOLDER", tmp_path / ".venv-bench")
    monkeypatch.setattr(environments, "PINS", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "_failures", {})
    monkeypatch.setattr(environments, "_run", run)
    for name in "xyz":
        (tmp_path / f"{name}.txt").write_text("torch==2.13.0\n")
    for _ in range(2):
        with pytest.raises(environments.EnvironmentFailed, match=r"torch==9"):
            environments.python_of("x")
    assert len(commands) == 2, "one to make it, one to install"
    why = no_index
    for _ in range(2):
        with pytest.raises(environments.EnvironmentFailed, match=r"from versions: none"):
            environments.python_of("y")  # another environment: the index was there
    assert len(commands) == 4
    with pytest.raises(environments.EnvironmentFailed, match="no package index can be reached, as for y"):
        environments.python_of("z")
    assert len(commands) == 4


def test_every_environment_pins_torch() -> None:
    for file in environments.PINS.glob("*.txt"):
        assert "torch==2.13.0" in file.read_text(encoding="utf-8").splitlines()
