"""The last layer computes what is predicted from, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fast.test_packed_model import make_rows
from tests.support.shapes import SHAPES, tiny_model
from tunery.data.batching import pack
from tunery.fast.packed_model import optimize_model

BLOCKS = {"gpt2": ("transformer.h", "mlp"), "gpt_neox": ("gpt_neox.layers", "mlp"), "opt": ("", "")}


@pytest.mark.parametrize("name", [shape for shape in SHAPES if shape != "opt"])
def test_only_predicting_positions_pass_through_the_last_feed_forward_block(name: str) -> None:
    model: Any = tiny_model(name).eval()
    flat = optimize_model(model)
    path, block = BLOCKS.get(name, ("model.layers", "mlp"))
    layers = model.get_submodule(path)
    seen: list[tuple[int, int]] = []
    for number, layer in enumerate(layers):
        inner = next(iter(getattr(layer, block).children()))
        inner.register_forward_pre_hook(lambda _, args, number=number: seen.append((number, args[0].shape[-2])))
    batch = pack(make_rows(4))
    assert len(batch.sources) < len(batch.ids)
    with torch.no_grad():
        flat.hidden(batch)
        assert set(seen) == {(0, len(batch.ids)), (1, len(batch.sources))}
        seen.clear()
        model(input_ids=torch.arange(3, 12)[None], use_cache=False)
    assert set(seen) == {(0, 9), (1, 9)}, "outside a run the model is as it was"


def test_looking_at_a_model_twice_does_not_hook_it_twice() -> None:
    model: Any = tiny_model("llama").eval()
    optimize_model(model)
    optimize_model(model)
    assert len(model.model.layers[-1].mlp._forward_pre_hooks) == 1
