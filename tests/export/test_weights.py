"""Files read and written piece by piece are those that the library reads and writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tunery.errors import ModelError
from tunery.export.targets.merged import Planned, as_bytes, write_file
from tunery.export.weights import FileWeights

TENSORS = {
    "b": torch.randn(5, 3),
    "a": torch.randn(4, 2, 2).bfloat16(),
    "scalar": torch.tensor(2.5),
    "ids": torch.arange(7),
    "half": torch.randn(3).half(),
    "flags": torch.tensor([True, False]),
    "nothing": torch.empty(0, 4),
}


def files(*paths: Path) -> FileWeights:
    """The tensors of some files."""
    source = SimpleNamespace(weight_files=lambda: list(paths))
    return FileWeights(source, nn.Module())  # type: ignore[arg-type]


def test_reading_whole_and_in_parts(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt", "by": "me"})
    found = files(tmp_path / "x.safetensors")
    assert found.metadata("x.safetensors") == {"format": "pt", "by": "me"}
    assert set(found.names()) == set(TENSORS)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert found.files() == {"x.safetensors": file.offset_keys()}
    for name, tensor in TENSORS.items():
        assert found.dtype(name) == tensor.dtype
        assert found.shape(name) == tensor.shape
        assert found.size(name) == tensor.nbytes
        assert torch.equal(found.read(name), tensor)
        if tensor.ndim:
            assert torch.equal(found.read(name, slice(1, 3)), tensor[1:3])
        assert bytes(as_bytes(found.read(name))) == bytes(as_bytes(tensor))


def test_a_type_that_is_not_read_as_numbers_is_copied(tmp_path: Path) -> None:
    tensor = torch.randn(4, 4).to(torch.float8_e4m3fn)
    save_file({"a": tensor}, tmp_path / "x.safetensors")
    found = files(tmp_path / "x.safetensors")
    assert found.dtype("a") is None
    plan = Planned(found.kind("a"), found.shape("a"), found.size("a"), [as_bytes(found.read("a"))])
    write_file(tmp_path / "y.safetensors", {"a": plan}, {})
    again = load_file(tmp_path / "y.safetensors")["a"]
    assert again.dtype == tensor.dtype
    assert bytes(as_bytes(again)) == bytes(as_bytes(tensor))


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    found = files(tmp_path / "x.safetensors")
    plans = {n: Planned(found.kind(n), found.shape(n), found.size(n), [as_bytes(found.read(n))]) for n in found.names()}
    write_file(tmp_path / "y.safetensors", plans, {"format": "pt"})
    again = load_file(tmp_path / "y.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(64)}, file)
    whole = file.read_bytes()
    for content in (whole[:-8], b"", b"\xff" * 40, whole[:20]):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=r"x\.safetensors is damaged"):
            files(file)
    file.unlink()
    with pytest.raises(ModelError, match=r"x\.safetensors is damaged"):
        files(file)


def test_a_plan_that_does_not_give_its_bytes_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a: 3 bytes instead of 4"):
        write_file(tmp_path / "x", {"a": Planned("F32", (1,), 4, [b"abc"])}, {})
