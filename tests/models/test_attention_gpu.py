"""Attention as a GPU computes it: the mask and its blocks, and the two kernels as far as a CPU can run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from tunery.data.batching import FlatBatch, Row, flatten
from tunery.models import attention_gpu
from tunery.models.attention import FlatLayout, flat_attention
from tunery.models.attention_gpu import GpuLayout, Rule, attend, by_lengths, by_tree, kernels
from tunery.models.tree_mask import block_pattern, tree_of

CPU = torch.device("cpu")
RULES = {
    "plain": {},
    "window": {"sliding_window": 7},
    "soft cap": {"softcap": 3.0},
    "sinks": {"s_aux": torch.linspace(-1, 2, 4, dtype=torch.float64)},
    "all": {"sliding_window": 9, "softcap": 2.0, "s_aux": torch.linspace(0, 1, 4, dtype=torch.float64)},
}


def random_rows(seed: int, count: int, longest: int = 60) -> list[Row]:
    """Rows over two tokens' alphabets that begin alike to several depths, as a tree of conversations would."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, 50, rng.integers(8, longest)) for _ in range(2)]
    rows: list[np.ndarray] = []
    for _ in range(count):
        earlier = rows[rng.integers(len(rows))] if rows and rng.random() < 0.6 else stems[rng.integers(2)]
        kept = earlier[: rng.integers(1, len(earlier) + 1)]
        rows.append(np.concatenate([kept, rng.integers(0, 50, rng.integers(1, longest))]).astype(np.int32))
    return [Row(ids, np.concatenate([[0], np.ones(len(ids) - 1)]).astype(np.float32)) for ids in rows]


def mask_of_rows(batch: FlatBatch, rows: Sequence[Row]) -> np.ndarray:
    """Who may see whom, from the token sequences alone: a key is visible if it is on the way to the query in some row,
    not after it. bool [T, T]."""
    seen = np.zeros((len(batch.ids), len(batch.ids)), bool)
    for number, row in enumerate(rows):
        mine = batch.owners == number
        ends = batch.sources[batch.entry[mine]]  # all positions are trained, so this is the whole row, but in order of
        path = ends[np.argsort(batch.positions[ends])]  # place
        assert batch.ids[path].tolist() == row.inputs.tolist()
        for i, query in enumerate(path):
            seen[query, path[: i + 1]] = True
    return seen


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 12),
    window=st.sampled_from([None, 1, 5, 40]),
    share=st.booleans(),
    block=st.sampled_from([4, 16, 128]),
)
def test_the_mask_and_its_blocks_are_what_the_rows_say(
    seed: int, count: int, window: int | None, share: bool, block: int
) -> None:
    rows = random_rows(seed, count)
    batch = flatten(rows, share=share)
    tree = tree_of(batch.groups)
    assert tree.position.tolist() == batch.positions.tolist()
    wanted = mask_of_rows(batch, rows)
    if window is not None:
        wanted &= batch.positions[:, None] - batch.positions[None, :] < window
    assert np.array_equal(tree.sees(window), wanted)
    size = -(-len(wanted) // block) * block
    padded = np.zeros((size, size), bool)
    padded[: len(wanted), : len(wanted)] = wanted
    cells = padded.reshape(size // block, block, size // block, block).transpose(0, 2, 1, 3)
    partial, full = block_pattern(tree, window, block)
    assert np.array_equal(full, cells.all(axis=(2, 3)))
    assert np.array_equal(partial, cells.any(axis=(2, 3)) & ~full)


def test_blocks_compared_in_parts_are_the_blocks_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunery.models import tree_mask

    tree = tree_of(flatten(random_rows(3, 20)).groups)
    whole = block_pattern(tree, 11, 16)
    monkeypatch.setattr(tree_mask, "_PAIRS", 1)
    assert all(np.array_equal(a, b) for a, b in zip(whole, block_pattern(tree, 11, 16), strict=True))


def test_padding_sees_nothing_and_is_not_seen() -> None:
    tree = tree_of(flatten(random_rows(1, 3)).groups)
    length = len(tree.enter)
    seen = tree.padded(length + 5).sees(None)
    assert np.array_equal(seen[:length, :length], tree.sees(None))
    assert not seen[length:].any()
    assert not seen[:, length:].any()


def test_the_block_mask_is_the_one_pytorch_makes_from_the_whole_mask() -> None:
    layout = GpuLayout(flatten(random_rows(8, 16)).groups, CPU)
    length = len(layout.tree.enter)
    assert length > 2 * attention_gpu.BLOCK
    for window in (None, 20):
        mine = layout.block_mask(window)
        theirs = flex.create_block_mask(mine.mask_mod, 1, 1, length, length, device="cpu")
        assert torch.equal(mine.to_dense(), theirs.to_dense())
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        for name in ("kv", "full_kv", "q", "full_q"):
            counts, got, wanted = (getattr(m, f"{name}_{part}") for m, part in (
                (mine, "num_blocks"), (mine, "indices"), (theirs, "indices")))  # fmt: skip
            for row, count in enumerate(counts[0, 0].tolist()):
                assert got[0, 0, row, :count].tolist() == wanted[0, 0, row, :count].tolist()


def heads(length: int, seed: int = 0, query: int = 4, keys: int = 2, width: int = 16) -> list[Tensor]:
    """Random queries, keys and values in float64, [H, T, D] and [G, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(query, length, width), (keys, length, width), (keys, length, width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def plainly(batch: FlatBatch, q: Tensor, k: Tensor, v: Tensor, **rule: Any) -> Tensor:
    """[H, T, E], as on a CPU."""
    out, _ = flat_attention(
        torch.nn.Identity(), q[None], k[None], v[None], None, 0.3, segments=FlatLayout(batch.groups, CPU), **rule
    )
    return out[0].transpose(0, 1)


def as_rule(sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None) -> Rule:
    return Rule(0.3, sliding_window, softcap, s_aux)


@pytest.fixture
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention computes gradients on a CPU, uncompiled, but refuses to; the refusal is taken away here."""
    if not hasattr(flex, "_validate_device"):
        pytest.skip("this PyTorch's FlexAttention is built in another way")
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("count", [2, 12], ids=["padded to two blocks", "longer"])
def test_flex_attention_over_the_tree_equals_attention_by_groups_with_its_gradient(
    rule: dict[str, Any], count: int, backward_on_cpu: None
) -> None:
    batch = flatten(random_rows(5, count))
    assert (len(batch.ids) < attention_gpu.SHORTEST) == (count == 2)
    layout = GpuLayout(batch.groups, CPU)
    results = []
    for compute in (
        lambda q, k, v, rule: plainly(batch, q, k, v, **rule),
        lambda q, k, v, rule: by_tree(q, k, v, layout, as_rule(**rule), flex.flex_attention),
    ):
        inputs = [x.requires_grad_() for x in heads(len(batch.ids))]
        out = compute(*inputs, rule)  # sinks belong to the frozen base
        slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, slope)])
    for wanted, got in zip(*results, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 1e-12


def test_flex_attention_is_compiled_once_for_batches_of_any_length(backward_on_cpu: None) -> None:
    """A kernel for each length would cost more than it saves, and PyTorch stops compiling after eight."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()
    compiled = torch.compile(flex.flex_attention, fullgraph=True, backend=count)
    for seed in range(6):
        batch = flatten(random_rows(seed, 3 + 2 * seed))
        layout = GpuLayout(batch.groups, CPU)
        for window in (None, 7, 12):
            q, k, v = heads(len(batch.ids))
            got = by_tree(q, k, v, layout, Rule(0.3, window), compiled)
            assert torch.allclose(got, plainly(batch, q, k, v, sliding_window=window))
    torch.compiler.reset()
    assert graphs <= 2


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_separate_segments_are_given_to_flash_attention_with_their_lengths_and_window(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention runs on a GPU only; a stand-in reads its arguments as its documentation says."""

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
        window_size: tuple[int, int], enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert enable_gqa == attention_gpu._FLASH_ASKS_FOR_GROUPS
        assert torch.equal(cu_q, cu_k)
        assert cu_q.dtype == torch.int32
        assert max_q == max_k == int(cu_q.diff().max())
        out = torch.empty_like(q)
        for low, high in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            place = torch.arange(high - low)
            back = place[:, None] - place[None, :]
            seen = (back >= -window_size[1]) & ((back <= window_size[0]) | (window_size[0] < 0))
            keys, values = (x[low:high].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[low:high], keys) * scale
            share = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[low:high] = torch.einsum("hqk,khd->qhd", share, values)
        return out

    monkeypatch.setattr(attention_gpu, "varlen_attn", stand_in)
    batch = flatten(random_rows(2, 7), share=False)
    q, k, v = heads(len(batch.ids))
    got = by_lengths(q, k, v, GpuLayout(batch.groups, CPU), Rule(0.3, window))
    assert torch.allclose(got, plainly(batch, q, k, v, sliding_window=window), rtol=1e-12, atol=1e-12)


def test_what_no_kernel_can_do_is_left_to_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    packed = GpuLayout(flatten(random_rows(2, 5), share=False).groups, CPU)
    shared = GpuLayout(flatten(random_rows(5, 12)).groups, CPU)
    assert shared.shared
    assert not packed.shared
    narrow, usual = torch.zeros(4, 10, 8), torch.zeros(4, 10, 64)
    half = usual.bfloat16()
    assert kernels(half, half, packed, Rule(1.0)) == [by_lengths, by_tree]
    assert kernels(half, half, packed, Rule(1.0, softcap=50.0)) == [by_tree]
    assert kernels(half, half, packed, Rule(1.0, sinks=torch.zeros(4))) == [by_tree]
    assert kernels(half, half, shared, Rule(1.0)) == [by_tree]
    assert kernels(usual, usual, packed, Rule(1.0)) == [by_tree]
    assert kernels(usual.double(), usual.double(), shared, Rule(1.0)) == []
    assert kernels(narrow, narrow, shared, Rule(1.0)) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert kernels(half, half, packed, Rule(1.0)) == [by_tree]


@pytest.mark.parametrize("fault", ["fails", "wrong", "none"])
def test_a_kernel_that_fails_or_gives_other_numbers_is_not_used_and_said(
    fault: str, monkeypatch: pytest.MonkeyPatch, backward_on_cpu: None
) -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        if fault == "fails":
            raise RuntimeError("no kernel image is available for execution on the device\nmore")
        out, aux = flex.flex_attention(q, k, v, **more)
        return (out.roll(1, 2) if fault == "wrong" else out), aux

    monkeypatch.setattr(attention_gpu, "_tried", {})
    monkeypatch.setattr(attention_gpu, "_compiled", lambda: broken)
    batch = flatten(random_rows(5, 12))
    q, k, v = (x.float() for x in heads(len(batch.ids)))
    layout, calls = GpuLayout(batch.groups, CPU), 0

    def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return plainly(batch, q, k, v)

    with torch.no_grad():
        outs = [attend(q, k, v, layout, Rule(0.3), plain) for _ in range(3)]
    assert calls == (fault != "fails")  # tried once
    if fault == "none":
        assert all(out is not None and torch.allclose(out, plainly(batch, q, k, v), atol=1e-5) for out in outs)
        assert attention_gpu.refusals() == []
    else:
        assert outs == [None] * 3
        (reason,) = attention_gpu.refusals()
        assert ("no kernel image is available" if fault == "fails" else "differs by") in reason
