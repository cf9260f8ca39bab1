"""Norms that keep less give what the model's own give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.support.double import Double
from tests.support.shapes import EXPERT_SHAPES, SHAPES, tiny_model
from tunery.fast.fused_rmsnorm import FusedRMSNorm, replace_norms

WITHOUT = ("gpt2", "opt", "gpt_neox")
"""Shapes with another kind of norm."""


@pytest.mark.parametrize("name", [*SHAPES, *EXPERT_SHAPES])
def test_every_rms_norm_is_replaced_and_gives_the_same_to_the_bit(name: str) -> None:
    model = tiny_model(name, torch.bfloat16).requires_grad_(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight)  # type: ignore[arg-type]
    lean = copy.deepcopy(model)
    norms = [path for path, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert replace_norms(lean) == len(norms)
    assert bool(norms) == (name not in WITHOUT)
    for path in norms:
        own, ours = model.get_submodule(path), lean.get_submodule(path)
        assert isinstance(ours, FusedRMSNorm)
        x = 3 * torch.randn(5, len(own.weight)).to(torch.bfloat16)  # type: ignore[arg-type]
        assert torch.equal(ours(x), own(x))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_the_gradient_is_that_of_the_written_out_norm(name: str) -> None:
    with Double():
        model = tiny_model(name, dtype=torch.float64).requires_grad_(False)
        own = copy.deepcopy(next(m for m in model.modules() if type(m).__name__.endswith("RMSNorm")))
        nn.init.normal_(own.weight)  # type: ignore[arg-type]
        holder = nn.Sequential(copy.deepcopy(own))
        assert replace_norms(holder) == 1
        x = torch.randn(4, len(own.weight), dtype=torch.float64, requires_grad=True)  # type: ignore[arg-type]
        got, wanted = (torch.autograd.grad(norm(x).cos().sum(), [x])[0] for norm in (holder, own))
    assert float((got - wanted).norm()) < 1e-12 * float(wanted.norm())


def test_a_trained_norm_and_one_that_does_something_else_are_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, x: Tensor) -> Tensor:
            return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1.0) * self.weight

    assert replace_norms(nn.Sequential(OddRMSNorm()).requires_grad_(False)) == 0
    assert replace_norms(tiny_model("llama")) == 0, "its weights would need a gradient"
