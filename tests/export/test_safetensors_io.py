"""Files read and written piece by piece are those that the library reads and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tunery.errors import ModelError
from tunery.export.safetensors_io import Planned, as_bytes, read_header, write_file

TENSORS = {
    "b": torch.randn(5, 3),
    "a": torch.randn(4, 2, 2).bfloat16(),
    "scalar": torch.tensor(2.5),
    "ids": torch.arange(7),
    "half": torch.randn(3).half(),
    "flags": torch.tensor([True, False]),
    "nothing": torch.empty(0, 4),
}


def test_reading_whole_and_in_parts(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt", "by": "me"})
    found, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "by": "me"}
    assert set(found) == set(TENSORS)
    assert [t.start for t in found.values()] == sorted(t.start for t in found.values())
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].read(), tensor)
        if tensor.ndim:
            assert torch.equal(found[name].read(slice(1, 3)), tensor[1:3])
        assert b"".join(found[name].bytes()) == bytes(as_bytes(tensor))


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    found, _ = read_header(tmp_path / "x.safetensors")
    plans = {n: Planned(t.kind, t.shape, t.size, t.bytes()) for n, t in found.items()}
    write_file(tmp_path / "y.safetensors", plans, {"format": "pt"})
    again = load_file(tmp_path / "y.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(64)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    found, _ = read_header(file)
    with pytest.raises(ModelError, match="shorter than its header says"):
        found["a"].read()
    with pytest.raises(ModelError, match="shorter than its header says"):
        list(found["a"].bytes())
    for content in (b"", b"\xff" * 40, whole[:20]):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="is damaged"):
            read_header(file)


def test_a_plan_that_does_not_give_its_bytes_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a: 3 bytes instead of 4"):
        write_file(tmp_path / "x", {"a": Planned("F32", (1,), 4, [b"abc"])}, {})
