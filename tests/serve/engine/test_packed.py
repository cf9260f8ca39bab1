"""Products with weights laid out for the processor: the same numbers, and the plain product where that fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tunery.inference import packed as module
from tunery.inference.packed import can_pack, packed, packed_sum, plain, plain_sum

CPU = torch.device("cpu")
FORMATS = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def numbers(*size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def need(dtype: torch.dtype) -> None:
    """Skip where oneDNN does not pack bfloat16: on a processor without AVX512. Float32 it always packs."""
    if dtype == torch.bfloat16 and not can_pack(CPU, dtype):
        pytest.skip("PyTorch packs no bfloat16 on this processor")


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 16, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_are_the_products(dtype: torch.dtype, rows: int, bias: bool) -> None:
    need(dtype)
    weight, x = numbers(70, 50, dtype=dtype), numbers(rows, 50, dtype=dtype, seed=1)
    added = numbers(70, dtype=dtype, seed=2) if bias else None
    wanted = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert (packed(weight, added) is not None) == can_pack(CPU, dtype)
    for product in filter(None, (packed(weight, added), plain(weight, added))):
        assert (product(x) - wanted).abs().max() < ROUNDING[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", FORMATS)
def test_packed_sums_are_the_sums(dtype: torch.dtype) -> None:
    need(dtype)
    B, h, y = (numbers(*size, dtype=dtype, seed=s) for s, size in enumerate([(70, 12), (9, 12), (9, 70)]))
    wanted = y.double() + h.double() @ B.double().t()
    assert (packed_sum(B) is not None) == can_pack(CPU, dtype)
    for add in filter(None, (packed_sum(B), plain_sum(B))):
        assert (add(y.clone(), h) - wanted).abs().max() < ROUNDING[dtype] * wanted.abs().max()


def test_other_formats_are_not_packed() -> None:
    assert not can_pack(CPU, torch.float64)
    assert not can_pack(torch.device("meta"), torch.float32)
    assert packed(numbers(4, 4, dtype=torch.float64), None) is None
    assert packed_sum(numbers(4, 4, dtype=torch.float64)) is None


def test_operators_that_give_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module._lay_out
    module._agree.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_lay_out", lambda weight: right(2 * weight))
            assert packed(numbers(4, 4, dtype=torch.float32), None) is None
    finally:
        module._agree.cache_clear()
    assert packed(numbers(4, 4, dtype=torch.float32), None) is not None
