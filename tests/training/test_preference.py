"""DPO training gives the gradient of the plain formula, however it is computed; in float64."""

from __future__ import annotations

import copy
import math
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
from tests.training.test_gradients import PLAIN, lora_model, padded, relative, written_out
from tunery.data.batching import MIN_SHARED, Row, largest_unit, micro_batches, pack
from tunery.fast.adapters import apply_lora
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.lora.attach import active_adapter, adapter_state, lora_layers, place, set_active
from tunery.lora.dropout import DropoutClock
from tunery.lora.layer import LoRATensors
from tunery.training import loss as losses
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import StepResult, train_step
from tunery.training.objectives import dpo
from tunery.training.objectives.dpo import DPO
from tunery.training.scoring import Scorer

CHECKED = ("llama", "gpt2", "qwen3", "gemma2")
BETA = 0.3


@pytest.fixture(autouse=True)
def everything_in_float64() -> Iterator[None]:
    with Double():
        yield


def make_pairs(seed: int, count: int, vocabulary: int = 60) -> list[Row]:
    """Pairs that share a system message, prompts (some between pairs), and at times the answer's beginning."""
    rng = np.random.default_rng(seed)
    system = rng.integers(3, vocabulary, 10)
    prompts = [np.concatenate([system, rng.integers(3, vocabulary, rng.integers(1, 14))]) for _ in range(count)]
    rows = []
    for index in range(count):
        prompt = prompts[0] if rng.random() < 0.3 else prompts[index]
        common = rng.integers(3, vocabulary, rng.integers(0, 12) if rng.random() < 0.5 else 0)
        for _ in range(2):
            answer = np.concatenate([common, rng.integers(3, vocabulary, rng.integers(1, 16))])
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            weights = np.zeros(len(ids), dtype=np.float32)
            weights[len(prompt) :] = 1
            if len(answer) > 6:
                weights[len(prompt) + 2 : len(prompt) + 4] = 0  # a tool's words between two of the assistant's
            rows.append(Row(ids, weights, f"line {index}", index))
    return rows


def padded_log_probabilities(model: torch.nn.Module, rows: Sequence[Row]) -> Tensor:
    """The plain way: one padded batch, full logits, log-softmax, summed over the trained tokens. [rows]"""
    ids, mask, weights = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    each = F.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return (each * weights[:, 1:]).sum(dim=1)


def plain(model: PackedModel, adapter: Mapping[str, Tensor], rows: Sequence[Row]) -> tuple[Tensor, list[Tensor]]:
    """(log-probability ratios of policy and reference [rows], gradient of the mean loss) by the formula.

    The policy is a copy of the model with transformers' own modules, the reference a copy of that without an adapter.
    """
    policy, own = PLAIN.get(model.model, (model.model, adapter))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(adapter[name])
    reference_model = copy.deepcopy(policy)
    for layer in lora_layers(reference_model).values():
        for name in list(layer.settings):
            layer.discard(name)
    with torch.no_grad():
        reference = padded_log_probabilities(reference_model, rows)
    with written_out():
        ratio = padded_log_probabilities(policy, rows) - reference
        loss = -torch.log(torch.sigmoid(BETA * (ratio[0::2] - ratio[1::2]))).mean()
        return ratio.detach(), list(torch.autograd.grad(loss, list(own.values())))


def ours(
    model: PackedModel, adapter: Mapping[str, Tensor], rows: Sequence[Row], limit: MicroBatchLimit
) -> tuple[StepResult, list[Tensor]]:
    result = train_step(model, list(adapter.values()), rows, limit, DropoutClock(), (0, 0), None, objective=DPO(BETA))
    return result, [t.grad.clone() for t in adapter.values() if t.grad is not None]


def mean_loss_of(ratio: Tensor) -> float:
    return float(-torch.log(torch.sigmoid(BETA * (ratio[0::2] - ratio[1::2]))).mean())


@pytest.mark.parametrize("name", CHECKED)
def test_packed_shared_and_micro_batched_pairs_give_the_gradient_of_the_formula(name: str) -> None:
    model, adapter = lora_model(name)
    assert model.flattened
    rows = make_pairs(3, 6)
    ratio, wanted = plain(model, adapter, rows)
    for limit in (MicroBatchLimit(6), MicroBatchLimit(2), MicroBatchLimit(1), MicroBatchLimit(6, tokens=50)):
        result, got = ours(model, adapter, rows, limit)
        assert result.loss == pytest.approx(mean_loss_of(ratio), rel=1e-9)
        assert relative(got, wanted) < 1e-9


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), limit=st.integers(1, 6))
def test_random_pairs_give_the_gradient_of_the_formula(seed: int, count: int, limit: int) -> None:
    with Double():
        model, adapter = lora_model("llama")
        rows = make_pairs(seed, count)
        _, wanted = plain(model, adapter, rows)
        _, got = ours(model, adapter, rows, MicroBatchLimit(limit))
    assert relative(got, wanted) < 1e-9


def test_the_metrics_are_the_mean_rewards_of_the_step() -> None:
    model, adapter = lora_model("llama")
    rows = make_pairs(1, 5)
    ratio, _ = plain(model, adapter, rows)
    chosen, rejected = BETA * ratio[0::2], BETA * ratio[1::2]
    expected = {
        "rewards_chosen": float(chosen.mean()),
        "rewards_rejected": float(rejected.mean()),
        "rewards_margin": float((chosen - rejected).mean()),
        "rewards_accuracy": float((chosen > rejected).double().mean()),
    }
    result, _ = ours(model, adapter, rows, MicroBatchLimit(2))
    assert result.metrics == pytest.approx(expected, rel=1e-9)
    loss, measured = DPO(BETA).measure(Scorer(model), rows)
    assert loss == pytest.approx(mean_loss_of(ratio), rel=1e-9)
    assert measured == pytest.approx(expected, rel=1e-9)


def test_a_fresh_adapter_has_the_loss_log_2_and_no_rewards() -> None:
    base = tiny_model("llama", dtype=torch.float64)
    apply_lora(base, rank=4, seed=1)
    result, grad = ours(optimize_model(base), dict(adapter_state(base)), make_pairs(2, 4), MicroBatchLimit(4))
    assert result.loss == pytest.approx(math.log(2), abs=1e-12)
    assert result.metrics["rewards_margin"] == pytest.approx(0, abs=1e-12)
    assert any(float(t.abs().max()) > 0 for t in grad)  # and yet it learns


def test_running_out_of_memory_halves_down_to_one_pair_and_leaves_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = lora_model("llama")
    rows = make_pairs(7, 6)
    _, wanted = ours(model, adapter, rows, MicroBatchLimit(6))
    real, limit = dpo.row_log_probabilities, MicroBatchLimit(6, noun="pair")
    seen: list[int] = []

    def tight(model: PackedModel, batch: object, count: int) -> Tensor:
        seen.append(count)
        if limit.rows > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch, count)  # type: ignore[arg-type]

    monkeypatch.setattr(dpo, "row_log_probabilities", tight)
    result, got = ours(model, adapter, rows, limit)
    assert (limit.rows, limit.words) == (1, "1 pair")
    assert min(seen) == 2  # never less than both answers of a pair
    assert relative(got, wanted) < 1e-9
    assert result.sums.data_tokens == sum(len(row.ids) for row in rows)  # counted once, not once more per attempt


def test_not_even_one_pair_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunery.errors import ModelError

    model, adapter = lora_model("llama")

    def none(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(dpo, "row_log_probabilities", none)
    with pytest.raises(ModelError, match="a single pair"):
        ours(model, adapter, make_pairs(0, 2), MicroBatchLimit(2, noun="pair"))


def test_a_model_with_its_own_logits_and_one_that_takes_one_row_at_a_time_agree() -> None:
    model, adapter = lora_model("llama")
    rows = make_pairs(5, 4)
    _, wanted = plain(model, adapter, rows)
    for other in (
        PackedModel(model.model, flattened=True, head=None),
        PackedModel(model.model, flattened=False, head=model.head),
        PackedModel(model.model, flattened=False, head=None),
    ):
        _, got = ours(other, adapter, rows, MicroBatchLimit(4))
        assert relative(got, wanted) < 1e-9


def test_an_adapted_head_and_embedding_are_trained_and_left_out_of_the_reference() -> None:
    base = tiny_model("llama", dtype=torch.float64)
    apply_lora(base, rank=4, targets=["q_proj", "lm_head", "embed_tokens"], seed=1)
    adapter = dict(adapter_state(base))
    with torch.no_grad():
        for tensor in adapter.values():
            tensor.add_(0.03)
    model = optimize_model(base)
    rows = make_pairs(4, 4)
    _, wanted = plain(model, adapter, rows)
    _, got = ours(model, adapter, rows, MicroBatchLimit(2))
    assert relative(got, wanted) < 1e-9


def test_the_head_in_chunks_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = lora_model("gemma2")  # with a soft cap on the logits
    rows = make_pairs(6, 4)
    _, wanted = plain(model, adapter, rows)
    monkeypatch.setattr(losses, "logit_chunk", lambda device: 1)
    _, got = ours(model, adapter, rows, MicroBatchLimit(4))
    assert relative(got, wanted) < 1e-9


def test_with_dropout_the_two_ways_draw_the_same_masks_and_the_reference_has_none() -> None:
    """Row by row, the log-probabilities are computed twice; other masks the second time would be another gradient."""
    base = tiny_model("llama", dtype=torch.float64)
    clock = DropoutClock()
    from tunery.lora.attach import attach

    attach(base, rank=4, alpha=8.0, dropout=0.5, seed=1, clock=clock)
    adapter = dict(adapter_state(base))
    with torch.no_grad():
        for tensor in adapter.values():
            tensor.add_(0.05)
    rows = make_pairs(8, 1)
    model = PackedModel(base, flattened=False, head=optimize_model(base).head)
    gradients = []
    for _ in range(2):
        train_step(model, list(adapter.values()), rows, MicroBatchLimit(1), clock, (0, 3), None, DPO(BETA))
        gradients.append([t.grad.clone() for t in adapter.values() if t.grad is not None])
    assert relative(gradients[0], gradients[1]) == 0
    clock.enabled = True
    clock.set(0, 3, 0)
    policy = torch.cat([losses.row_log_probabilities(model, pack([row]), 1) for row in rows])
    clock.enabled = False
    plain_model = copy.deepcopy(base)
    for layer in lora_layers(plain_model).values():
        layer.discard("default")
    with torch.no_grad():
        reference = padded_log_probabilities(plain_model, rows)
    ratio = policy - reference
    loss = -torch.log(torch.sigmoid(BETA * (ratio[0] - ratio[1])))
    assert relative(gradients[0], torch.autograd.grad(loss, list(adapter.values()))) < 1e-9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_against_a_starting_adapter_the_gradient_is_that_of_the_formula(name: str) -> None:
    base = tiny_model(name, dtype=torch.float64)
    apply_lora(base, rank=4, seed=1)
    adapter = dict(adapter_state(base))
    random = torch.Generator().manual_seed(5)

    def move(size: float) -> None:
        with torch.no_grad():
            for tensor in adapter.values():
                tensor.add_(torch.randn(tensor.shape, generator=random, dtype=tensor.dtype) * size)

    move(0.1)
    start = copy.deepcopy(base)
    pieces = {
        path: LoRATensors(layer.settings["default"], layer.lora_A["default"], layer.lora_B["default"])
        for path, layer in lora_layers(base).items()
    }
    place(base, "reference", pieces, trainable=False)
    set_active(base, "default")
    move(0.05)
    policy = copy.deepcopy(base)
    model = optimize_model(base)
    rows = make_pairs(9, 5)
    with torch.no_grad():
        reference = padded_log_probabilities(start, rows)
    with written_out():
        ratio = padded_log_probabilities(policy, rows) - reference
        loss = -torch.log(torch.sigmoid(BETA * (ratio[0::2] - ratio[1::2]))).mean()
        wanted = torch.autograd.grad(loss, list(adapter_state(policy).values()))
    objective = DPO(BETA, "reference")
    for other in (model, PackedModel(base, flattened=False, head=model.head)):
        for limit in (MicroBatchLimit(5), MicroBatchLimit(2)):
            result = train_step(other, list(adapter.values()), rows, limit, DropoutClock(), (0, 0), None, objective)
            assert result.loss == pytest.approx(float(loss.detach()), rel=1e-9)
            assert relative([t.grad for t in adapter.values() if t.grad is not None], wanted) < 1e-9
    assert objective.measure(Scorer(model), rows)[0] == pytest.approx(float(loss.detach()), rel=1e-9)
    assert DPO(BETA).measure(Scorer(model), rows)[0] != pytest.approx(float(loss.detach()), rel=1e-3)
    assert active_adapter(base) == "default"
    assert all(tensor.grad is None for tensor in adapter_state(base, "reference").values())


def test_prompts_are_computed_once_for_both_answers_and_for_all_that_share_them() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 60, 40)
    rows = []
    for index in range(6):
        ids = np.concatenate([prompt, rng.integers(3, 60, 5)]).astype(np.int32)
        rows.append(Row(ids, np.r_[np.zeros(40), np.ones(5)].astype(np.float32), "", index // 2))
    assert len(pack(rows).ids) <= 40 + 6 * 4


def test_what_must_fit_in_memory_is_the_largest_pair_with_its_prompt_once() -> None:
    rows = [
        Row(np.arange(3, 3 + n, dtype=np.int32), np.r_[np.zeros(n - 1), 1].astype(np.float32)) for n in (9, 12, 5, 5)
    ]
    assert largest_unit(rows, 2) == 11  # 8 tokens are computed for the first, which the second shares
    assert largest_unit(rows, 1) == 11


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 9), limit=st.integers(1, 9), tokens=st.integers(1, 200))
def test_micro_batches_never_part_a_pair(seed: int, count: int, limit: int, tokens: int) -> None:
    rows = make_pairs(seed, count)
    place = {id(row): number for number, row in enumerate(rows)}
    parts = list(micro_batches(rows, limit, tokens, unit=2))
    assert sorted(place[id(row)] for part in parts for row in part) == list(range(len(rows)))
    for part in parts:
        numbers = [place[id(row)] for row in part]
        assert [n + 1 for n in numbers[0::2]] == numbers[1::2]
        assert all(n % 2 == 0 for n in numbers[0::2])
        assert len(part) <= 2 * limit
        slack = MIN_SHARED * len(part)  # shorter common beginnings are computed again
        assert len(part) == 2 or len(pack(part).ids) <= tokens + slack
