"""Steps of many rows in one pass: every logit is that of the row computed alone by the untouched model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.serve.engine.helpers import prompt_of, tiny_base, write_adapter
from tests.support.host_waits import NoHostWaits
from tunery.errors import ModelError
from tunery.inference.adapter_cache import Adapter
from tunery.inference.kv_cache import Cache
from tunery.inference.runner import Runner, RunnerPart
from tunery.lora.adapter import load_adapter
from tunery.models.load import Base

SHAPES = ("llama", "gpt2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "gpt_oss", "qwen3_moe")
LENGTHS = (1, 5, 12, 19, 30, 41)


def serve(base: Base) -> Runner:
    return Runner(base, adapters=8, wake=lambda: None)


Pieces = list[tuple[int, torch.Tensor]]
"""A row's logits in pieces, each with the place of its first token."""


def random_walk(runner: Runner, rows: list[list[int]], adapters: list[Adapter | None], seed: int) -> list[Pieces]:
    """The rows' logits, computed in pieces of random sizes, rows joining and leaving at random."""
    rng = np.random.default_rng(seed)
    cache = Cache(runner.shapes, runner.dtype, runner.device, 1 << 30)
    cache.take(8)  # a row that is never computed: its slot is a hole
    places = [cache.take(len(row)) for row in rows]
    done = [0] * len(rows)
    found: list[Pieces] = [[] for _ in rows]
    while any(at < len(row) for at, row in zip(done, rows, strict=True)):
        parts = []
        for i in rng.permutation(len(rows)):
            left = len(rows[i]) - done[i]
            if not left or rng.random() < 0.3:
                continue
            count = min(left, int(rng.choice([1, 1, 2, 7, 16])))
            tokens = rows[i][done[i] : done[i] + count]
            parts.append(RunnerPart(i, places[i], adapters[i], tokens, done[i], int(rng.integers(0, 2)) * count))
        if not parts:
            continue
        kept, logits = runner.run(parts)
        at = 0
        for part in kept:
            found[part.row].append((part.start, logits[at : at + part.keep]))
            at += part.keep
        assert at == len(logits)
        for part in parts:
            done[part.row] += len(part.tokens)
    return found


def compare(found: Sequence[Pieces], truths: Sequence[torch.Tensor], tolerance: float) -> None:
    seen = 0
    for pieces, truth in zip(found, truths, strict=True):
        for start, logits in pieces:
            wanted = truth[start : start + len(logits)]
            assert (logits - wanted).abs().max() <= tolerance * truth.abs().max()
            seen += len(logits)
    assert seen > 20


def plain(model: torch.nn.Module, rows: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_pieces_have_the_logits_of_rows_alone(shape: str) -> None:
    base = tiny_base(shape, torch.float64)
    rows = [prompt_of(length, seed=length) for length in LENGTHS]
    truth = plain(base.model, rows)
    runner = serve(base)
    for seed in (0, 1):
        compare(random_walk(runner, rows, [None] * len(rows), seed), truth, 1e-5)


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gemma2", "opt"])
def test_a_step_never_waits_for_the_device(shape: str) -> None:
    runner = serve(tiny_base(shape))
    cache = Cache(runner.shapes, runner.dtype, runner.device, 1 << 30)
    rows = [prompt_of(length, seed=length) for length in (5, 9, 14)]
    places = [cache.take(len(row)) for row in rows]
    for low, high in ((0, 4), (4, 5)):  # stretches, then single tokens
        parts = [
            RunnerPart(None, place, None, row[low:high], low, high - low)
            for place, row in zip(places, rows, strict=True)
        ]
        with NoHostWaits():
            kept, logits = runner.run(parts)
        assert len(logits) == sum(part.keep for part in kept)


@pytest.mark.parametrize("shape", ["qwen3", "gemma2", "gpt_oss"])
def test_long_stretches_are_computed_in_blocks(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tunery.inference.cached_attention as attention

    monkeypatch.setattr(attention, "BLOCK_QUERIES", 5)
    monkeypatch.setattr(attention, "KEPT_MASK", 200)
    monkeypatch.setattr(attention, "WRITTEN_OUT", 300)
    base = tiny_base(shape, torch.float64)
    rows = [prompt_of(length, seed=length) for length in LENGTHS]
    truth = plain(base.model, rows)
    compare(random_walk(serve(base), rows, [None] * len(rows), 2), truth, 1e-5)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_each_row_has_its_own_adapter(shape: str, tmp_path: Path) -> None:
    """Adapters of different rank, scaling and layers in one step, rows without one among them."""
    base = tiny_base(shape, torch.float64)
    names = [name for name, m in base.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    some = [name for name in names if name.endswith(("q_proj", "c_attn", "down_proj", "c_proj", "o_proj"))]
    settings = [{"rank": 2}, {"rank": 5, "targets": some, "alpha": 3.0}, {"rank": 3, "rank_stabilized": True}]
    folders = [write_adapter(base.model, tmp_path / str(i), seed=i, **s) for i, s in enumerate(settings)]
    rows = [prompt_of(length, seed=length) for length in LENGTHS]
    truth = plain(base.model, rows)
    chosen = [None, 0, 1, 2, 1, 0]
    reference = tiny_base(shape, torch.float64).model
    for number, folder in enumerate(folders):
        load_adapter(reference, folder, f"a{number}")
        for at, which in enumerate(chosen):
            if which == number:
                truth[at] = plain(reference, [rows[at]])[0]
    runner = serve(base)
    adapters = [None if w is None else runner.bank.read(str(w), folders[w]) for w in range(3)]
    by_row = [None if which is None else adapters[which] for which in chosen]
    compare(random_walk(runner, rows, by_row, 3), truth, 1e-5)


def test_adapters_reach_embeddings_and_the_output_head(tmp_path: Path) -> None:
    base = tiny_base("llama", torch.float64)
    targets = ["embed_tokens", "lm_head", "v_proj"]
    folders = [write_adapter(base.model, tmp_path / str(i), seed=i, targets=targets, rank=2 + i) for i in range(2)]
    rows = [prompt_of(length, seed=length) for length in (9, 14, 20)]
    truth = plain(base.model, rows)
    reference = tiny_base("llama", torch.float64).model
    for number, folder in enumerate(folders):
        load_adapter(reference, folder, f"a{number}")
        truth[number + 1] = plain(reference, [rows[number + 1]])[0]
    runner = serve(base)
    adapters = [None, *(runner.bank.read(str(i), folder) for i, folder in enumerate(folders))]
    compare(random_walk(runner, rows, adapters, 0), truth, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_the_base_is_the_same_to_the_bit_beside_adapters(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_base(shape, dtype)
    folder = write_adapter(base.model, tmp_path / "a", seed=1)
    runner = serve(base)
    adapter = runner.bank.read("a", folder)
    rows = [prompt_of(length, seed=length) for length in (7, 7, 12, 12)]

    def logits(adapters: list[Adapter | None]) -> torch.Tensor:
        cache = Cache(runner.shapes, runner.dtype, runner.device, 1 << 30)
        places = [cache.take(20) for _ in rows]
        outs = []
        for low, high in ((0, 6), (6, 7)):
            parts = [
                RunnerPart(i, place, used, row[low:high], low, high - low)
                for i, (place, used, row) in enumerate(zip(places, adapters, rows, strict=True))
            ]
            kept, got = runner.run(parts)
            by_row = dict(zip([p.row for p in kept], got.split([p.keep for p in kept]), strict=True))
            outs.append(torch.stack([by_row[i] for i in range(len(rows))]))
        return torch.cat(outs, dim=1)

    alone, beside = logits([None] * 4), logits([None, adapter, None, adapter])
    assert torch.equal(alone[[0, 2]], beside[[0, 2]])
    assert not torch.allclose(alone[[1, 3]], beside[[1, 3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sharing_a_matrix_takes_no_memory_and_changes_no_weight(dtype: torch.dtype) -> None:
    """In float64 the layers' weights become views of one; in float32 they are given up for one laid out anew."""
    base, untouched = tiny_base("qwen2", dtype), tiny_base("qwen2", dtype).model
    runner = serve(base)
    assert {len(group.sites) for group in runner._groups} == {1, 2, 3}
    mine = {name.replace(".base.", "."): p for name, p in base.model.named_parameters()}
    for name, parameter in untouched.named_parameters():
        if mine[name].numel() or dtype == torch.float64:
            assert torch.equal(mine[name], parameter)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.model.parameters()}
    whole = sum(p.numel() * p.element_size() for p in untouched.parameters())
    empty = sum(not parameter.numel() for parameter in mine.values())
    assert empty == (0 if dtype == torch.float64 else 2 * 7)
    assert sum(storages.values()) == whole if dtype == torch.float64 else sum(storages.values()) < whole


def test_a_model_whose_answers_would_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import tunery.inference.cached_attention as attention

    right = attention.stretch_attention

    def forgets_the_cache(q, keys, values, start, rule, masks):
        return right(q, keys[:, start:], values[:, start:], 0, rule, {})

    monkeypatch.setattr(attention, "stretch_attention", forgets_the_cache)
    with pytest.raises(ModelError, match="gives other answers when requests share a batch"):
        serve(tiny_base("llama"))


def test_the_context_ends_where_positions_would_turn_otherwise() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    base = tiny_base("phi3", torch.float64, rope_parameters=rope, original_max_position_embeddings=64)
    assert serve(base).context == 64
