"""The GPU's kernels are tried before a run, on the model's own kinds of attention, and never within a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import CheckpointError
from transformers import PreTrainedModel

from tests.fast.flash import flash
from tests.support.shapes import tiny_model
from tunery.data.batching import Row, pack
from tunery.fast import attention, attention_flex, attention_gpu, attention_trials
from tunery.fast.adapters import apply_lora
from tunery.fast.attention_gpu import GpuLayout, attend, by_equal_lengths, by_lengths, by_tree
from tunery.fast.attention_rule import Rule
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.lora.attach import trainable_parameters
from tunery.training.decoder_layers import running_layers
from tunery.training.loss import batch_loss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels as far as a CPU can run them: flash attention stood in for, FlexAttention uncompiled."""
    if not hasattr(flex_attention, "_validate_device"):
        pytest.skip("this PyTorch's FlexAttention is built in another way")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(attention_flex, "_compiled", lambda: attention_flex.over_blocks)
    monkeypatch.setattr(attention_gpu, "varlen_attn", flash)
    monkeypatch.setattr(attention_gpu, "EQUAL_LENGTHS_BACKEND", torch.nn.attention.SDPBackend.MATH)
    monkeypatch.setattr(attention_gpu, "FLASH_DTYPES", (torch.float32,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention_trials, "_times", lambda *_: [1.0, 2.0])
    attention_gpu.forget()
    yield
    attention_gpu.forget()


def rows(count: int, stem: int = 20) -> list[Row]:
    rng = np.random.default_rng(count)
    begin = rng.integers(3, 60, stem)
    each = [np.concatenate([begin, rng.integers(3, 60, 5 + 3 * i)]).astype(np.int32) for i in range(count)]
    return [Row(ids, np.concatenate([[0], np.ones(len(ids) - 1)]).astype(np.float32)) for ids in each]


def tuned(name: str = "llama", **changes: Any) -> tuple[PreTrainedModel, list[torch.nn.Parameter]]:
    model = tiny_model(name, **{"hidden_size": 64, "head_dim": 16, **changes}).eval()
    apply_lora(model, rank=4, targets="all-linear")
    return model, trainable_parameters(model)


def gradient(model: PackedModel, parameters: Sequence[Tensor], share: bool) -> list[Tensor]:
    with model.running():
        return list(torch.autograd.grad(batch_loss(model, pack(rows(5), share=share)).total, parameters))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "packed"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_first_batch_of_a_run_may_recompute_its_layers(recompute: bool, share: bool) -> None:
    """A kernel that was first tried within a layer would leave tensors there which the second pass does not
    (torch.utils.checkpoint: a different number of tensors was saved)."""
    model, parameters = tuned()
    flat = optimize_model(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KERNEL_DEVICES", ())
        wanted = gradient(flat, parameters, share)
    with running_layers(model, recompute):
        got = gradient(flat, parameters, share)
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (got, wanted))
    assert float((a - b).norm() / b.norm()) < 1e-5
    assert attention_gpu.refusals() == []


def test_a_kernel_tried_within_a_recomputed_layer_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above, if kernels were tried where they are first asked for."""
    model, parameters = tuned()
    flat = optimize_model(model)
    attention_gpu.forget()

    def at_once(q: Tensor, k: Tensor, v: Tensor, layout: GpuLayout, rule: Rule) -> Tensor | None:
        attend(q, k, v, layout, rule)
        attention_trials.try_kernels(attention._plainly)
        layout.chosen.clear()
        return attend(q, k, v, layout, rule)

    monkeypatch.setattr(attention, "attend", at_once)
    with running_layers(model, recompute=True), pytest.raises(CheckpointError):
        gradient(flat, parameters, share=False)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_all_kernels_are_tried_before_the_run_on_the_layers_own_kinds_of_attention(name: str) -> None:
    model, _ = tuned(name, **({"query_pre_attn_scalar": 5} if name == "gemma2" else {}))
    model.set_attn_implementation("eager")  # transformers 5.17 loads Gemma 2 with SDPA, which knows no soft cap
    assert optimize_model(model).flattened
    config = model.config
    keys: list[tuple[Any, ...]] = list(attention_gpu._tried)
    tried = {(kernel, attention_gpu.AttentionCase(*case)) for kernel, *case in keys}
    flash = {"llama": {by_equal_lengths, by_lengths}}.get(name, set())
    assert {kernel for kernel, _ in tried} == {by_tree, *flash}
    assert {kind.windowed for _, kind in tried} == ({False} if name == "llama" else {False, True})
    for _, kind in tried:
        assert (kind.heads, kind.kv_heads, kind.width, kind.value_width) == (4, 2, 16, 16)
        assert kind.scale == pytest.approx(5**-0.5 if name == "gemma2" else 16**-0.5)
        assert kind.softcap == getattr(config, "attn_logit_softcapping", None)
        assert kind.sinks == (name == "gpt_oss")
    assert attention_gpu.refusals() == []
    assert not attention_gpu._untried


def test_a_trial_has_rows_as_long_and_laid_out_as_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    run, try_one = attention_trials._run, attention_trials._try
    given: list[Tensor] = []
    met: set[tuple[str, bool, bool]] = set()

    def watched_run(compute: Any, inputs: Any, slope: Tensor) -> list[Tensor]:
        return run(lambda q, k, v: given.append(q) or compute(q, k, v), inputs, slope)

    def watched_try(kernel: Any, kind: Any, layout: GpuLayout, plain: Any) -> str | None:
        met.add((kernel.__name__, layout.shared, layout.one_length is not None))
        return try_one(kernel, kind, layout, plain)

    monkeypatch.setattr(attention_trials, "_run", watched_run)
    monkeypatch.setattr(attention_trials, "_try", watched_try)
    optimize_model(tuned()[0])
    assert met == {
        ("by_tree", True, False),
        ("by_tree", False, False),
        ("by_tree", False, True),
        ("by_lengths", False, False),
        ("by_lengths", False, True),
        ("by_equal_lengths", False, True),
    }
    for q in given:
        assert q.shape[1] >= 300
        assert q.shape[1] % attention_flex.BLOCK
        assert q.stride() == (q.shape[2], q.shape[0] * q.shape[2], 1)  # [H, T, D], a view of [T, H, D]


def batch_kernel(flat: PackedModel, share: bool, batch: list[Row] | None = None) -> str | None:
    """The kernel that a batch is computed with."""
    inputs = flat._inputs(pack(batch or rows(5), share=share))
    with flat.running(), torch.no_grad():
        flat.model.get_decoder()(**inputs)
    layout = inputs["segments"]
    assert isinstance(layout, attention.PackedLayout)
    assert layout.gpu is not None
    (kernel,) = set(layout.gpu.chosen.values())
    return kernel and kernel.__name__


def test_cudnn_computes_rows_of_one_length_once_their_shape_has_come_often() -> None:
    flat = optimize_model(tuned()[0])
    equal = [rows(1)[0]] * 3
    assert batch_kernel(flat, share=True) == "by_tree"
    assert batch_kernel(flat, share=False) == "by_lengths"
    found = [batch_kernel(flat, False, equal) for _ in range(attention_gpu.WORTH_A_PLAN + 2)]
    assert found == ["by_lengths"] * attention_gpu.WORTH_A_PLAN + ["by_equal_lengths"] * 2
    assert batch_kernel(flat, False, [rows(1)[0]] * 2) == "by_lengths"  # another shape


def test_cudnn_is_not_used_where_it_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu, "WORTH_A_PLAN", 0)
    equal = [rows(1)[0]] * 3
    assert batch_kernel(optimize_model(tuned()[0]), False, equal) == "by_equal_lengths"
    attention_gpu.forget()
    monkeypatch.setattr(attention_trials, "_times", lambda *_: [1.0, 1.02])
    assert batch_kernel(optimize_model(tuned()[0]), False, equal) == "by_lengths"
    assert attention_gpu.refusals() == []  # nobody misses it


class _NaNBackward(torch.autograd.Function):
    """The output as it is, its gradients not numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return torch.full_like(slopes[0], torch.nan)


@pytest.mark.parametrize("fault", ["fails", "wrong", "not a number"])
def test_a_kernel_that_fails_or_gives_other_numbers_is_not_used_and_said(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def broken(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if fault == "fails":
            raise RuntimeError("no kernel image is available for execution on the device\nmore")
        if fault == "not a number":  # in the gradients alone: 0 there times infinity
            return _NaNBackward.apply(attention_flex.over_blocks(*args))
        return attention_flex.over_blocks(*args).roll(1, 1)

    monkeypatch.setattr(attention_flex, "_compiled", lambda: broken)
    flat = optimize_model(tuned()[0])
    assert flat.flattened
    before = calls
    assert batch_kernel(flat, share=True) is None
    assert calls == before
    assert batch_kernel(flat, share=False) == "by_lengths"
    (reason,) = attention_gpu.refusals()
    said = {"fails": "no kernel image is available", "wrong": "differs by", "not a number": "gives NaN"}
    assert said[fault] in reason


def test_an_engine_with_attention_of_its_own_compiles_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any) -> Tensor:
        raise AssertionError("compiled for nothing")

    monkeypatch.setattr(attention_flex, "_compiled", lambda: compiled)
    flat = optimize_model(tuned()[0], kernels=False)
    assert flat.flattened
    assert attention_gpu.refusals() == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("InductorError: CUDA out of memory. Tried")]
)
def test_memory_that_runs_out_in_a_trial_refuses_neither_the_kernel_nor_the_model(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Tensor:
        raise error

    model, _ = tuned()
    monkeypatch.setattr(attention_flex, "_compiled", lambda: full)
    with pytest.raises(torch.OutOfMemoryError):
        optimize_model(model)
    assert attention_gpu.refusals() == []
    monkeypatch.setattr(attention_flex, "_compiled", lambda: attention_flex.over_blocks)
    flat = optimize_model(model)
    assert flat.flattened
    assert batch_kernel(flat, share=True) == "by_tree"


def test_memory_that_runs_out_while_two_kernels_are_compared_leaves_the_question_to_the_next_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_gpu, "WORTH_A_PLAN", 0)
    model, _ = tuned()
    equal = [rows(1)[0]] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_trials, "_times", full)
        flat = optimize_model(model)
        assert batch_kernel(flat, False, equal) == "by_lengths"
        assert not attention_gpu._untried  # not to be timed again in every batch
    assert batch_kernel(optimize_model(model), False, equal) == "by_equal_lengths"


def test_a_kind_of_attention_that_turns_up_later_is_tried_before_the_next_batch() -> None:
    model, parameters = tuned()
    flat = optimize_model(model)
    attention_gpu.forget()
    found = [batch_kernel(flat, share=False) for _ in range(2)]
    assert found == [None, "by_lengths"]
    assert all(g.isfinite().all() for g in gradient(flat, parameters, share=True))
