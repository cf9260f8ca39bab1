"""The folder that a GPU machine without a network is given."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import gpu_site

FILES = {
    "bitsandbytes/__init__.py": "",
    "bitsandbytes/libbitsandbytes_cpu.so": "cpu",
    "bitsandbytes/libbitsandbytes_cuda130.so": "cuda",
    "bitsandbytes/libbitsandbytes_cuda118.so": "old",
    "bitsandbytes/libbitsandbytes_rocm72.so": "other",
}


def test_every_package_has_a_version_and_constraints_come_first(tmp_path: Path) -> None:
    found = gpu_site.versions(gpu_site.PINS)
    assert tuple(found) == gpu_site.PACKAGES
    pins = gpu_site.PINS[0].read_text(encoding="utf-8").splitlines()
    assert f"pydantic_core=={found['pydantic_core']}" in pins
    assert f"bitsandbytes=={found['bitsandbytes']}" in pins
    (tmp_path / "pins.txt").write_text("click==8\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"no version of pydantic, .* in pins\.txt"):
        gpu_site.versions([tmp_path / "pins.txt"])


def test_wheels_are_unpacked_and_trimmed_once(tmp_path: Path) -> None:
    asked: list[Sequence[str]] = []

    def download(pins: Sequence[str], folder: Path) -> None:
        asked.append(pins)
        with zipfile.ZipFile(folder / "bitsandbytes-1-py3-none-any.whl", "w") as wheel:
            for name, content in FILES.items():
                wheel.writestr(name, content)

    site = tmp_path / ".site"
    assert gpu_site.make(site, {"bitsandbytes": "1"}, download)
    assert asked == [["bitsandbytes==1"]]
    assert {file.name for file in (site / "bitsandbytes").glob("*.so")} == {
        "libbitsandbytes_cpu.so",
        "libbitsandbytes_cuda130.so",
    }
    (metadata,) = site.glob("tunery-*.dist-info/METADATA")
    assert "Name: tunery\nVersion: " in metadata.read_text(encoding="utf-8")
    assert not gpu_site.make(site, {"bitsandbytes": "1"}, download)
    assert gpu_site.make(site, {"bitsandbytes": "2"}, download)
    assert len(asked) == 2
    assert [path.name for path in tmp_path.iterdir()] == [".site"]


def test_one_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    site = tmp_path / ".site"
    gpu_site.make(site, {}, lambda pins, folder: None)

    def fails(pins: Sequence[str], folder: Path) -> None:
        raise SystemExit("pip could not download the wheels")

    with pytest.raises(SystemExit):
        gpu_site.make(site, {"click": "8"}, fails)
    assert [path.name for path in tmp_path.iterdir()] == [".site"]
    assert not gpu_site.make(site, {}, fails)


def test_one_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / ".site"
    site.mkdir()
    (site / "a").write_bytes(bytes(2_000_000))
    monkeypatch.setattr(gpu_site, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_site, "SITE", site)
    monkeypatch.setattr(gpu_site, "versions", lambda files: {})
    monkeypatch.setattr(gpu_site, "make", lambda site, wanted: True)
    gpu_site.main()
    assert capsys.readouterr().out == ".site: 2.0 MB\n"
    monkeypatch.setattr(gpu_site, "LIMIT", 1_500_000)
    with pytest.raises(SystemExit, match="more than the 2 MB that may be carried"):
        gpu_site.main()
