"""Shelves of rows: growing, moving, closing gaps, and the budget."""

from __future__ import annotations

import pytest
import torch

from tunery.inference.kv_cache import SMALLEST, Cache, CacheFullError, LayerShape, Slot

SHAPES = (LayerShape(2, 4, 4), LayerShape(1, 8, 6), LayerShape(2, 4, 4))
CPU = torch.device("cpu")


def make(rows: int = 100) -> Cache:
    """With a budget for so many rows of the smallest shelf."""
    numbers = sum(shape.numbers for shape in SHAPES)
    return Cache(SHAPES, torch.float32, CPU, rows * SMALLEST * numbers * 4)


def mark(place: Slot, value: float, length: int) -> None:
    for keys, values in place.shelf.slabs.layers:
        keys[place.slot, :, :length] = value
        values[place.slot, :, :length] = -value


def holds(place: Slot, value: float, length: int) -> bool:
    return all(
        bool((keys[place.slot, :, :length] == value).all() and (values[place.slot, :, :length] == -value).all())
        for keys, values in place.shelf.slabs.layers
    )


def test_layers_of_different_shapes_get_their_own_slabs() -> None:
    place = make().take(10)
    shapes = [(keys.shape[1:], values.shape[1:]) for keys, values in place.shelf.slabs.layers]
    assert shapes == [
        ((2, SMALLEST, 4), (2, SMALLEST, 4)),
        ((1, SMALLEST, 8), (1, SMALLEST, 6)),
        ((2, SMALLEST, 4), (2, SMALLEST, 4)),
    ]


def test_rows_keep_their_content_while_the_shelf_grows() -> None:
    cache = make()
    places = []
    for number in range(20):
        places.append(cache.take(SMALLEST))
        mark(places[-1], number + 1.0, SMALLEST)
    assert len({place.slot for place in places}) == 20
    assert all(holds(place, number + 1.0, SMALLEST) for number, place in enumerate(places))


def test_a_row_that_outgrows_its_shelf_moves_with_what_it_holds() -> None:
    cache = make()
    place, other = cache.take(SMALLEST), cache.take(SMALLEST)
    mark(place, 3.0, SMALLEST)
    cache.extend(place, SMALLEST + 1, SMALLEST)
    assert place.shelf.capacity == 2 * SMALLEST
    assert holds(place, 3.0, SMALLEST)
    assert other.shelf.used == 1
    assert place.shelf.places[place.slot] is place


def test_gaps_are_closed_when_many_rows_have_left() -> None:
    cache = make()
    places = [cache.take(SMALLEST) for _ in range(12)]
    for number, place in enumerate(places):
        mark(place, number + 1.0, SMALLEST)
    for place in places[:9]:
        cache.release(place)
    cache.tidy()
    assert places[11].shelf.span == 3
    assert sorted(place.slot for place in places[9:]) == [0, 1, 2]
    assert all(holds(place, number + 1.0, SMALLEST) for number, place in enumerate(places) if number >= 9)


def test_the_budget_is_kept() -> None:
    cache = make(rows=6)
    places = [cache.take(SMALLEST) for _ in range(6)]
    with pytest.raises(CacheFullError):
        cache.take(SMALLEST)
    with pytest.raises(CacheFullError):
        cache.extend(places[0], SMALLEST + 1, 5)
    assert places[0].shelf.capacity == SMALLEST
    assert cache.bytes() <= cache.budget
    for place in places[1:]:
        cache.release(place)
    cache.take(SMALLEST)


def test_one_row_can_grow_to_the_longest_the_budget_allows() -> None:
    cache = make(rows=7)
    place = cache.take(1)
    for length in range(1, cache.longest_row + 1):
        cache.extend(place, length, length - 1)
        cache.tidy()
    assert cache.longest_row == 4 * SMALLEST
    assert place.shelf.capacity == cache.longest_row


def test_shelves_that_nobody_uses_are_given_back_when_memory_is_needed() -> None:
    cache = make(rows=8)
    places = [cache.take(SMALLEST) for _ in range(8)]
    for place in places:
        cache.release(place)
    long = cache.take(4 * SMALLEST)
    assert long.shelf.capacity == 4 * SMALLEST
    assert cache.bytes() <= cache.budget
