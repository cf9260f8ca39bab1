"""Which models run flattened, and that those which cannot still give the right numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from tests.support.double import Double
from tests.support.host_waits import NoHostWaits
from tests.support.shapes import EXPERT_SHAPES, SHAPES, tiny_model
from tunery.data.batching import Row, pack
from tunery.fast.adapters import apply_lora
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.lora.attach import trainable_parameters
from tunery.training.loss import batch_loss
from tunery.training.scoring import score


def make_rows(count: int = 6) -> list[Row]:
    rng = np.random.default_rng(4)
    stem = rng.integers(3, 60, 17)
    rows = []
    for index in range(count):
        ids = np.concatenate([stem, rng.integers(3, 60, 2 + 3 * index)]).astype(np.int32)
        weights = np.ones(len(ids), np.float32)
        weights[:12] = 0
        rows.append(Row(ids, weights, "", index))
    return rows


@torch.no_grad()
def plain_scores(model: torch.nn.Module, rows: list[Row]) -> list[float]:
    """Each row alone, through the model's own forward pass."""
    scores = []
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        log = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        trained = np.flatnonzero(row.weights)
        scores.append(float(sum(log[t - 1, ids[t]] for t in trained)))
    return scores


@pytest.mark.parametrize("name", [*SHAPES, *EXPERT_SHAPES])
def test_every_usual_shape_runs_flattened_and_scores_as_alone(name: str) -> None:
    with Double():
        model = tiny_model(name, dtype=torch.float64).eval()
        flat = optimize_model(model)
        assert flat.flattened
        assert flat.head is not None
        rows = make_rows()
        assert score(flat, rows).log_probability.tolist() == pytest.approx(plain_scores(model, rows), rel=1e-9)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("head", [True, False], ids=["our head", "its head"])
def test_a_micro_batch_forward_and_backward_never_waits_for_the_device(name: str, head: bool) -> None:
    """Once a batch is laid out. transformers, for one, looks for packed rows where a mask function is registered."""
    # with a padding token, GPT-2 looks whether it was given any
    as_the_real_one: dict[str, Any] = {"pad_token_id": None} if name == "gpt2" else {}
    model = tiny_model(name, **as_the_real_one).eval()
    apply_lora(model, rank=4, targets="all-linear")
    flat = optimize_model(model)
    flat = flat if head else replace(flat, head=None)
    parameters = trainable_parameters(model)
    for share in (True, False):
        batch = pack(make_rows(), share=share)
        with NoHostWaits(), flat.running():
            found = torch.autograd.grad(batch_loss(flat, batch).total, parameters)
        assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("reads", [lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x[x > 0]])
def test_what_would_wait_is_noticed(reads: Callable[[Tensor], object], inference: bool) -> None:
    with torch.inference_mode(inference), NoHostWaits(), pytest.raises(AssertionError, match="waits for the device"):
        reads(torch.ones(3))


def mamba() -> torch.nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))


def bloom() -> torch.nn.Module:
    """Its positions are in the attention scores (ALiBi), which a packed sequence does not give it."""
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3))


@pytest.mark.parametrize("make", [mamba, bloom])
def test_a_model_that_cannot_run_flattened_runs_row_by_row(make: object) -> None:
    torch.manual_seed(0)
    model = make().eval()  # type: ignore[operator]
    flat = optimize_model(model)
    assert not flat.flattened
    rows = make_rows()
    assert score(flat, rows).log_probability.tolist() == pytest.approx(plain_scores(model, rows), rel=1e-4)


def test_a_wrong_way_of_running_would_be_noticed() -> None:
    """The check itself: a head with another scale must not pass."""
    from tunery.fast import packed_model as module

    model = tiny_model("llama").eval()
    good = optimize_model(model)
    assert good.head is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_transforms", lambda config: (1.7, None))
        assert optimize_model(model).head is None


def test_attention_is_as_before_outside_the_flattened_context() -> None:
    model = tiny_model("llama").eval()
    before = model.config._attn_implementation
    flat = optimize_model(model)
    score(flat, make_rows(2))
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError), flat.running():
        raise RuntimeError
    assert model.config._attn_implementation == before


def test_a_row_at_a_time_refuses_a_merged_batch() -> None:
    model = tiny_model("llama").eval()
    with pytest.raises(ValueError, match="one row"):
        PackedModel(model, flattened=False, head=None).logits(pack(make_rows(2)))


def test_memory_that_runs_out_while_a_model_is_looked_at_says_nothing_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").eval()

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    with monkeypatch.context() as patched:
        patched.setattr(PackedModel, "hidden", full)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            optimize_model(model)
    assert optimize_model(model).flattened
