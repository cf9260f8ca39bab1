"""Attention as a GPU computes it: the mask and its blocks, and the two kernels as far as a CPU can run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention import SDPBackend
from torch.nn.attention import flex_attention as flex

from tests.fast.flash import flash
from tunery.data.batching import PackedBatch, Row, pack
from tunery.fast import attention_flex, attention_gpu
from tunery.fast.attention import PackedLayout, flat_attention
from tunery.fast.attention_flex import BLOCK, SHORTEST, block_mask, over_blocks
from tunery.fast.attention_gpu import (
    AttentionCase,
    GpuLayout,
    by_equal_lengths,
    by_lengths,
    by_tree,
    fits,
    kernels_for,
)
from tunery.fast.attention_rule import Rule
from tunery.fast.tree_mask import block_pattern, tree_of

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


def mask_of_rows(batch: PackedBatch, rows: Sequence[Row]) -> np.ndarray:
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
    batch = pack(rows, share=share)
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
    from tunery.fast import tree_mask

    tree = tree_of(pack(random_rows(3, 20)).groups)
    whole = block_pattern(tree, 11, 16)
    monkeypatch.setattr(tree_mask, "_PAIRS", 1)
    assert all(np.array_equal(a, b) for a, b in zip(whole, block_pattern(tree, 11, 16), strict=True))


def test_padding_sees_nothing_and_is_not_seen() -> None:
    tree = tree_of(pack(random_rows(1, 3)).groups)
    length = len(tree.enter)
    seen = tree.padded(length + 5).sees(None)
    assert np.array_equal(seen[:length, :length], tree.sees(None))
    assert not seen[length:].any()
    assert not seen[:, length:].any()


def test_the_block_mask_is_the_one_pytorch_makes_from_the_whole_mask() -> None:
    layout = GpuLayout(pack(random_rows(8, 16)).groups, CPU)
    length = len(layout.tree.enter)
    assert length > 2 * BLOCK
    assert length % BLOCK == 0
    for window in (None, 20):
        mine = block_mask(layout.tree_tensors, layout.blocks(window))
        theirs = flex.create_block_mask(mine.mask_mod, 1, 1, length, length, device="cpu")
        assert torch.equal(mine.to_dense(), theirs.to_dense())
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        for name in ("kv", "full_kv", "q", "full_q"):
            counts, got, wanted = (
                getattr(m, f"{name}_{part}")
                for m, part in ((mine, "num_blocks"), (mine, "indices"), (theirs, "indices"))
            )
            for row, count in enumerate(counts[0, 0].tolist()):
                assert got[0, 0, row, :count].tolist() == wanted[0, 0, row, :count].tolist()


def heads(
    length: int, seed: int = 0, query: int = 4, keys: int = 2, width: int = 16, learnt: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values in float64, [H, T, D] and [G, T, D]; `learnt` asks for their gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(count: int) -> Tensor:
        values = torch.randn(count, length, width, generator=generator, dtype=torch.float64)
        return values.requires_grad_(learnt)

    return random(query), random(keys), random(keys)


def plainly(batch: PackedBatch, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.3, **rule: Any) -> Tensor:
    """[H, T, E], as on a CPU."""
    out, _ = flat_attention(
        torch.nn.Identity(), q[None], k[None], v[None], None, scale, segments=PackedLayout(batch.groups, CPU), **rule
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
    batch = pack(random_rows(5, count))
    assert (len(batch.ids) < SHORTEST) == (count == 2)
    layout = GpuLayout(batch.groups, CPU)
    results = []
    for compute in (
        lambda q, k, v, rule: plainly(batch, q, k, v, **rule),
        lambda q, k, v, rule: by_tree(q, k, v, layout, as_rule(**rule), over_blocks),
    ):
        inputs = heads(len(batch.ids), learnt=True)
        out = compute(*inputs, rule)  # sinks belong to the frozen base
        slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, slope)])
    for wanted, got in zip(*results, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 1e-12


class Counting:
    """A compiler that leaves the graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return graph


@pytest.fixture
def counting(backward_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """FlexAttention as it is compiled on a GPU, up to what the graphs are made into."""
    compiler = Counting()
    torch.compiler.reset()
    attention_gpu.forget()
    compiled = torch.compile(over_blocks, fullgraph=True, backend=compiler)
    monkeypatch.setattr(attention_flex, "_compiled", lambda: compiled)
    yield compiler
    torch.compiler.reset()
    attention_gpu.forget()


def test_flex_attention_is_compiled_once_for_batches_of_any_length(counting: Counting) -> None:
    """And once without gradients. The rows are given as models give them, by token first."""
    for seed in range(6):
        batch = pack(random_rows(seed, 2 + 3 * seed))
        layout = GpuLayout(batch.groups, CPU)
        for window in (None, 7, 12):
            q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in heads(len(batch.ids)))
            got = by_tree(q, k, v, layout, Rule(0.3, window))
            assert torch.allclose(got, plainly(batch, q, k, v, sliding_window=window))
            with torch.no_grad():
                by_tree(q, k, v, layout, Rule(0.3, window))
            q, k, v = (x.contiguous().requires_grad_() for x in (q, k, v))
            by_tree(q, k, v, layout, Rule(0.3, window))
    assert counting.graphs == 3  # nothing needs a gradient, no gradients, all need one


def test_a_process_may_hold_many_models(counting: Counting) -> None:
    """PyTorch stops compiling a function after eight graphs; each kind of model makes two."""
    batch = pack(random_rows(3, 12))
    shapes = [(4, 2, 16, 0.25), (6, 2, 16, 0.25), (8, 8, 16, 0.125), (4, 4, 32, 0.2), (8, 2, 32, 0.3), (2, 1, 16, 0.4)]
    for query, keys, width, scale in shapes * 2:
        layout = GpuLayout(batch.groups, CPU)
        inputs = heads(len(batch.ids), query=query, keys=keys, width=width, learnt=True)
        got = by_tree(*inputs, layout, Rule(scale))
        with torch.no_grad():
            assert torch.equal(by_tree(*inputs, layout, Rule(scale)), got)
        assert torch.allclose(got, plainly(batch, *inputs, scale=scale), rtol=1e-9, atol=1e-12)
    assert counting.graphs == 2 * len(shapes)


def test_the_compiler_is_told_no_length_and_that_it_is_a_whole_number_of_blocks(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(Counting, "__call__", lambda self, graph, _: graphs.append(graph) or graph)
    batch = pack(random_rows(5, 12))
    by_tree(*heads(len(batch.ids)), GpuLayout(batch.groups, CPU), Rule(0.3))
    (call,) = (node for node in graphs[0].graph.nodes if node.target is torch.ops.higher_order.flex_attention)
    query, mask = call.args[0].meta["example_value"], call.args[4]
    for length in (query.shape[2], *(size.meta["example_value"] for size in mask[:2])):
        assert isinstance(length, torch.SymInt)
        assert statically_known_true(length % BLOCK == 0)


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_separate_segments_are_given_to_flash_attention_with_their_lengths_and_window(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: int, **options: Any) -> Tensor:
        assert options.get("enable_gqa", False) == attention_gpu._FLASH_ASKS_FOR_GROUPS
        assert torch.equal(cu_q, cu_k)
        assert cu_q.dtype == torch.int32
        assert list(rest) == [int(cu_q.diff().max())] * 2
        return flash(q, k, v, cu_q, cu_k, *rest, **options)

    monkeypatch.setattr(attention_gpu, "varlen_attn", checked)
    batch = pack(random_rows(2, 7), share=False)
    q, k, v = heads(len(batch.ids))
    got = by_lengths(q, k, v, GpuLayout(batch.groups, CPU), Rule(0.3, window))
    assert torch.allclose(got, plainly(batch, q, k, v, sliding_window=window), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_segments_of_one_length_are_a_batch(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, forward and backward; on a GPU it is cuDNN that computes the batch."""
    monkeypatch.setattr(attention_gpu, "EQUAL_LENGTHS_BACKEND", SDPBackend.MATH)
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(0, 50, 38).astype(np.int32), np.ones(38, np.float32)) for _ in range(3)]
    batch = pack(rows, share=False)
    layout = GpuLayout(batch.groups, CPU)
    assert layout.one_length == 37
    results = []
    for compute in (plainly, lambda _, q, k, v: by_equal_lengths(q, k, v, layout, Rule(0.3))):
        inputs = heads(len(batch.ids), keys=keys, learnt=True)
        out = compute(batch, *inputs)
        slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, slope)])
    for wanted, got in zip(*results, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 1e-12


def kind(dtype: torch.dtype, width: int = 64, softcap: float | None = None, sinks: bool = False) -> AttentionCase:
    return AttentionCase(dtype, CPU, 4, 4, width, width, 1.0, False, softcap, sinks)


def test_what_no_kernel_can_do_is_left_to_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    half = torch.bfloat16
    assert kernels_for(kind(half)) == [by_equal_lengths, by_lengths, by_tree]
    assert kernels_for(kind(half, softcap=50.0)) == [by_tree]
    assert kernels_for(kind(half, sinks=True)) == [by_tree]
    assert kernels_for(kind(torch.float32)) == [by_tree]
    assert kernels_for(kind(torch.float64)) == []
    assert kernels_for(kind(torch.float32, width=8)) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert kernels_for(kind(half)) == [by_tree]


def test_a_kernel_is_given_only_rows_that_it_can_compute() -> None:
    shared = GpuLayout(pack(random_rows(5, 12)).groups, CPU)
    packed = GpuLayout(pack(random_rows(2, 5), share=False).groups, CPU)
    equal = GpuLayout(pack([Row(np.arange(9, dtype=np.int32), np.ones(9, np.float32))] * 2, share=False).groups, CPU)
    assert shared.shared
    assert not packed.shared
    assert equal.one_length == 8
    layouts = {"shared": shared, "packed": packed, "equal": equal}
    kernels = (by_tree, by_lengths, by_equal_lengths)
    found = {name: [fits(kernel, layout, None) for kernel in kernels] for name, layout in layouts.items()}
    assert found == {"shared": [True, False, False], "packed": [True, True, False], "equal": [True, True, True]}
    assert [fits(by_equal_lengths, equal, window) for window in (7, 8, 9)] == [False, True, True]
