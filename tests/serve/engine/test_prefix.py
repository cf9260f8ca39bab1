"""Blocks of common prefixes."""

from __future__ import annotations

import torch

from tests.serve.engine.test_cache import CPU, SHAPES, make
from tunery.inference.kv_cache import Slot
from tunery.inference.prefix import BLOCK, PrefixStore, chain

TOKENS = list(range(1000, 1000 + 5 * BLOCK + 3))
BYTES = BLOCK * sum(shape.numbers for shape in SHAPES) * 4


def store(blocks: int) -> PrefixStore:
    return PrefixStore(SHAPES, torch.float32, CPU, blocks * BYTES)


def filled(seed: int) -> Slot:
    place = make().take(6 * BLOCK)
    generator = torch.Generator().manual_seed(seed)
    for slab in (*place.shelf.slabs.keys, *place.shelf.slabs.values):
        slab.copy_(torch.randn(slab.shape, generator=generator))
    return place


def test_a_block_is_named_by_the_adapter_and_all_tokens_up_to_its_end() -> None:
    names = chain("a", TOKENS)
    assert len(names) == 5
    assert names == chain("a", TOKENS[: 5 * BLOCK], names[:2])
    assert names != chain("b", TOKENS)
    changed = [0, *TOKENS[1:]]
    assert not set(names) & set(chain("a", changed))
    later = [*TOKENS[: 3 * BLOCK], 0, *TOKENS[3 * BLOCK + 1 :]]
    assert chain("a", later)[:3] == names[:3]
    assert chain("a", later)[3] != names[3]


def test_what_is_kept_comes_back_to_the_bit() -> None:
    kept, source = store(8), filled(0)
    names = chain("", TOKENS)
    kept.put("", names, source, 0, 4)
    assert kept.match(names) == 4
    target = filled(1)
    kept.copy_to(target, names[:4])
    for (k, v), (own_k, own_v) in zip(source.shelf.slabs.layers, target.shelf.slabs.layers, strict=True):
        assert torch.equal(k[source.slot, :, : 4 * BLOCK], own_k[target.slot, :, : 4 * BLOCK])
        assert torch.equal(v[source.slot, :, : 4 * BLOCK], own_v[target.slot, :, : 4 * BLOCK])


def test_the_least_recently_used_block_leaves_and_never_before_one_that_follows_it() -> None:
    kept, source = store(6), filled(0)
    old, new = chain("", TOKENS), chain("", TOKENS[::-1])
    kept.put("", old, source, 0, 4)
    assert kept.match(old[:2]) == 2
    kept.put("", new, source, 0, 4)
    assert len(kept) == 6
    assert kept.match(new) == 4
    assert kept.match(old) == 2


def test_an_adapters_blocks_are_forgotten() -> None:
    kept, source = store(8), filled(0)
    for key in ("a", "b"):
        kept.put(key, chain(key, TOKENS), source, 0, 3)
    kept.forget("a")
    assert kept.match(chain("a", TOKENS)) == 0
    assert kept.match(chain("b", TOKENS)) == 3


def test_without_a_budget_nothing_is_kept() -> None:
    kept = store(0)
    kept.put("", chain("", TOKENS), filled(0), 0, 3)
    assert len(kept) == 0
    assert kept.match(chain("", TOKENS)) == 0
