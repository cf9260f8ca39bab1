"""`tunery doctor`: says what is there and what is not, and never fails because something is broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tunery import doctor
from tunery.cli import cli
from tunery.models import device
from tunery.versions import optional_packages


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of this test alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TUNERY_HOME", str(tmp_path / "home"))
    return tmp_path


def test_the_machine_as_training_sees_it(places: Path) -> None:
    (places / "cache").mkdir()
    (places / "cache" / "rows").write_bytes(b"x" * 1234)
    report = doctor.examine_machine()
    assert report.problems == []
    assert report.versions["torch"]
    assert report.computing is not None
    assert report.computing.device == device.pick_device("auto").type
    assert report.computing.dtype in ("float32", "bfloat16")
    assert report.computing.available_bytes > 0
    sizes = {Path(place.path).name: place.bytes for place in report.storage}
    assert sizes == {"cache": 1234, "hub": None, "home": None, "runs": None}
    assert report.environment["TUNERY_CACHE"] == str(places / "cache")


def test_passwords_in_addresses_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@mirror.example/hub")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "secret" not in json.dumps(doctor.examine_machine().as_json())


def test_nobody_is_asked_where_the_environment_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_why_unreachable", lambda address: pytest.fail("asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = doctor.examine_machine().hub
    assert hub is not None
    assert (hub.offline, hub.reachable) == (["HF_HUB_OFFLINE"], None)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "no address"])
def test_a_hub_that_does_not_answer_is_no_failure(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    hub = doctor.examine_machine().hub
    assert hub is not None
    assert hub.reachable is False
    assert hub.detail


def test_a_broken_torch_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file\nmore")

    monkeypatch.setattr(device, "pick_device", broken)
    report = doctor.examine_machine()
    assert report.problems == ["device: OSError: libcudart.so.12: cannot open shared object file"]
    assert report.computing is None
    assert report.processor is not None


def test_without_torch_the_rest_is_still_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "tunery.models.device")
    done = CliRunner().invoke(cli, ["doctor"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "problem: device: " in done.output
    assert "Optional parts" in done.output


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version_or_none
    monkeypatch.setattr(doctor, "_version_or_none", lambda name: None if name == "fastapi" else real(name))
    parts = {part.name: part for part in doctor.examine_machine().optional}
    assert parts["serve"].missing == ["fastapi"]
    assert parts["serve"].install.startswith("pip install ")
    assert "[serve]" in parts["serve"].install
    assert set(optional_packages()) <= set(parts)
    assert "dev" not in parts
    assert all(part.purpose for part in parts.values())


def test_json_for_programs() -> None:
    done = CliRunner().invoke(cli, ["doctor", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["computing"]["dtype"] in ("float32", "bfloat16")
