"""Nothing changes the gradient but the data: packing, shared prefixes, micro-batches and accumulation, in float64."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.double import Double
from tests.support.shapes import tiny_model
from tunery.data.batching import Row, pack
from tunery.fast import attention
from tunery.fast.adapters import apply_lora
from tunery.fast.fused_linear import FusedLoRALinear
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.lora.attach import adapter_state
from tunery.lora.dropout import DropoutClock
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import train_step
from tunery.training.loss import batch_loss
from tunery.training.scoring import score

CHECKED = ("llama", "gpt2", "qwen3", "gemma2", "mistral", "phi3", "gpt_oss")

PLAIN = weakref.WeakKeyDictionary[torch.nn.Module, tuple[torch.nn.Module, Mapping[str, Tensor]]]()
"""A model of `lora_model` → its copy, on which nothing was replaced, and that copy's adapter."""


@pytest.fixture(autouse=True)
def everything_in_float64() -> Iterator[None]:
    with Double():
        yield


def make_rows(seed: int, count: int, vocabulary: int = 60) -> list[Row]:
    rng = np.random.default_rng(seed)
    stem, branch = rng.integers(3, vocabulary, 14), rng.integers(3, vocabulary, 10)
    rows = []
    for index in range(count):
        middle = branch if rng.random() < 0.5 else branch[:0]
        ids = np.concatenate([stem, middle, rng.integers(3, vocabulary, rng.integers(1, 20))]).astype(np.int32)
        weights = (rng.random(len(ids)) < 0.3).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        rows.append(Row(ids, weights, "", index))
    if count > 2:
        rows[-1] = rows[0]  # equal rows happen
    return rows


def tree_rows(seed: int, count: int, vocabulary: int = 60) -> list[Row]:
    """Rows that begin as earlier ones do, so that they form a tree of any depth."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for index in range(count):
        earlier = rows[int(rng.integers(len(rows)))].ids if rows and rng.random() < 0.8 else np.zeros(0, np.int32)
        begin = earlier[: int(rng.integers(0, len(earlier) + 1))]
        ids = np.concatenate([begin, rng.integers(3, vocabulary, rng.integers(1, 24))]).astype(np.int32)[:60]
        ids = np.concatenate([[1], ids]).astype(np.int32) if len(ids) < 2 else ids
        weights = (rng.random(len(ids)) < 0.3).astype(np.float32) * rng.choice([1.0, 0.5], len(ids))
        weights[0], weights[-1] = 0, 1
        rows.append(Row(ids, weights.astype(np.float32), "", index))
    return rows


def lora_model(name: str) -> tuple[PackedModel, dict[str, torch.nn.Parameter]]:
    """A tiny model in float64 whose adapter is not zero."""
    model = tiny_model(name, dtype=torch.float64).eval()
    apply_lora(model, rank=4, targets="all-linear", seed=1)
    adapter = dict(adapter_state(model))
    with torch.no_grad():
        for index, tensor in enumerate(adapter.values()):
            noise = torch.Generator().manual_seed(index)
            tensor.add_(torch.randn(tensor.shape, generator=noise, dtype=tensor.dtype) * 0.05)
    plain = copy.deepcopy(model)
    flat = optimize_model(model)
    PLAIN[model] = plain, dict(adapter_state(plain))
    return flat, adapter


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """LoRA as the paper writes it, operation by operation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedLoRALinear, "part", lambda self, x: None)
        yield


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as one padded batch: token ids, attention mask, weights, each [rows, longest]."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, weights = torch.zeros_like(ids), torch.zeros(len(rows), width, dtype=torch.float64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.from_numpy(row.ids.astype(np.int64))
        mask[i, : len(row.ids)] = 1
        weights[i, : len(row.ids)] = torch.from_numpy(row.weights)
    return ids, mask, weights


def padded_gradient(
    model: PackedModel, adapter: Mapping[str, Tensor], rows: Sequence[Row]
) -> tuple[float, list[Tensor]]:
    """The plain way: transformers' own modules, one padded batch, full logits, cross-entropy divided once by the
    trained weight."""
    plain, adapter = PLAIN.get(model.model, (model.model, adapter))
    ids, mask, weights = padded(rows)
    with written_out():
        logits = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    loss = (each * weights[:, 1:]).sum() / weights.sum()
    return float(loss.detach()), list(torch.autograd.grad(loss, list(adapter.values())))


def relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    flat_a, flat_b = torch.cat([t.flatten() for t in a]), torch.cat([t.flatten() for t in b])
    return float((flat_a - flat_b).norm() / flat_b.norm())


def our_gradient(
    model: PackedModel, adapter: Mapping[str, Tensor], rows: Sequence[Row], limit: MicroBatchLimit
) -> tuple[float, list[Tensor]]:
    result = train_step(model, list(adapter.values()), rows, limit, DropoutClock(), (0, 0), None)
    return result.loss, [t.grad.clone() for t in adapter.values() if t.grad is not None]


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("keys", [0, 640], ids=["recomputed", "kept"])
def test_packed_shared_micro_batched_and_accumulated_equal_one_padded_batch(
    name: str, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KEPT_KEYS", keys)
    model, adapter = lora_model(name)
    assert model.flattened
    assert model.head is not None
    rows = make_rows(3, 8)
    loss, wanted = padded_gradient(model, adapter, rows)
    for limit in (MicroBatchLimit(8), MicroBatchLimit(3), MicroBatchLimit(1), MicroBatchLimit(8, tokens=40)):
        got_loss, got = our_gradient(model, adapter, rows, limit)
        assert got_loss == pytest.approx(loss, rel=1e-9)
        assert relative(got, wanted) < 1e-9


def test_plain_packing_without_sharing_gives_the_same_gradient() -> None:
    model, adapter = lora_model("llama")
    rows = make_rows(5, 6)
    _, wanted = padded_gradient(model, adapter, rows)
    weight = sum(float(row.weights.sum()) for row in rows)
    loss = batch_loss(model, pack(rows, share=False)).total / weight
    assert relative(torch.autograd.grad(loss, list(adapter.values())), wanted) < 1e-9


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gpt_oss"])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 9),
    limit=st.integers(1, 9),
    kept=st.sampled_from([0, 20, 640]),
    queries=st.sampled_from([5, 256]),
    scores=st.sampled_from([1, 1 << 22]),
)
def test_random_trees_give_the_padded_gradient(
    name: str, seed: int, count: int, limit: int, kept: int, queries: int, scores: int
) -> None:
    """Whatever the tree, the micro-batches, and how attention cuts its work into blocks."""
    with Double(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KEPT_KEYS", kept)
        patch.setattr(attention, "BLOCK_QUERIES", queries)
        patch.setattr(attention, "BLOCK_SCORES", scores)
        model, adapter = lora_model(name)
        rows = tree_rows(seed, count)
        _, wanted = padded_gradient(model, adapter, rows)
        _, got = our_gradient(model, adapter, rows, MicroBatchLimit(limit))
    assert relative(got, wanted) < 1e-9


def test_accumulation_is_a_bigger_batch_when_rows_train_different_numbers_of_tokens() -> None:
    """The mistake of dividing each micro-batch by its own count: a long and a short row would count alike."""
    model, adapter = lora_model("llama")
    rng = np.random.default_rng(0)
    long, short = rng.integers(3, 60, 40).astype(np.int32), rng.integers(3, 60, 5).astype(np.int32)
    rows = [
        Row(long, np.array([0] + [1] * 39, dtype=np.float32)),
        Row(short, np.array([0, 0, 0, 0, 1], dtype=np.float32)),
    ]
    _, wanted = padded_gradient(model, adapter, rows)
    _, got = our_gradient(model, adapter, rows, MicroBatchLimit(1))
    assert relative(got, wanted) < 1e-9
    halves = [padded_gradient(model, adapter, [row])[1] for row in rows]
    wrong = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    assert relative(wrong, wanted) > 1e-2


def test_packed_rows_do_not_see_each_other() -> None:
    model, _ = lora_model("llama")
    rows = make_rows(11, 5)
    alone = [score(model, [row]).log_probability[0] for row in rows]
    assert score(model, rows).log_probability.tolist() == pytest.approx(alone, rel=1e-9)


def test_running_out_of_memory_halves_the_micro_batch_and_leaves_the_update_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tunery.training.objectives import sft

    model, adapter = lora_model("llama")
    rows = make_rows(7, 8)
    _, wanted = our_gradient(model, adapter, rows, MicroBatchLimit(8))
    real, limit = sft.batch_loss, MicroBatchLimit(8)

    def tight(model: PackedModel, batch: object) -> object:
        if limit.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(sft, "batch_loss", tight)
    _, got = our_gradient(model, adapter, rows, limit)
    assert (limit.rows, limit.halvings) == (2, 2)
    assert relative(got, wanted) < 1e-9


def test_an_adapted_head_and_a_model_that_computes_its_own_logits_agree_with_the_fused_loss() -> None:
    model, adapter = lora_model("llama")
    rows = make_rows(2, 5)
    loss, wanted = padded_gradient(model, adapter, rows)
    own = PackedModel(model.model, flattened=True, head=None)
    got_loss, got = our_gradient(own, adapter, rows, MicroBatchLimit(5))
    assert got_loss == pytest.approx(loss, rel=1e-9)
    assert relative(got, wanted) < 1e-9
    one_by_one = PackedModel(model.model, flattened=False, head=model.head)
    _, got = our_gradient(one_by_one, adapter, rows, MicroBatchLimit(5))
    assert relative(got, wanted) < 1e-9


def test_lora_on_the_head_and_the_embedding_is_trained_with_the_padded_gradient() -> None:
    base = tiny_model("llama", dtype=torch.float64).eval()
    apply_lora(base, rank=4, targets=["q_proj", "lm_head", "embed_tokens"], seed=1)
    adapter = dict(adapter_state(base))
    with torch.no_grad():
        for tensor in adapter.values():
            tensor.add_(0.03)
    plain = copy.deepcopy(base)
    model = optimize_model(base)
    PLAIN[base] = plain, dict(adapter_state(plain))
    rows = make_rows(4, 5)
    _, wanted = padded_gradient(model, adapter, rows)
    _, got = our_gradient(model, adapter, rows, MicroBatchLimit(5))
    assert relative(got, wanted) < 1e-9


def test_the_head_loss_in_chunks_is_the_loss_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunery.training import loss as losses

    model, adapter = lora_model("gemma2")  # with a soft cap on the logits
    rows = make_rows(6, 6)
    _, wanted = our_gradient(model, adapter, rows, MicroBatchLimit(6))
    monkeypatch.setattr(losses, "logit_chunk", lambda device: 1)
    _, got = our_gradient(model, adapter, rows, MicroBatchLimit(6))
    assert relative(got, wanted) < 1e-12


def test_mean_loss_is_per_trained_token() -> None:
    model, adapter = lora_model("gpt2")
    rows = make_rows(9, 7)
    loss, _ = padded_gradient(model, adapter, rows)
    assert score(model, rows).mean_loss == pytest.approx(loss, rel=1e-9)
