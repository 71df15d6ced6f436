"""Interleaving: every item complete, in its own order and evenly spread, wherever reading starts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from helpers.data.order import interleaving as module
from helpers.data.order.interleaving import GROUP_SIZE, Interleaving

counts_of_items = st.lists(st.integers(0, 3000), min_size=1, max_size=6).filter(any)


def read(order: Interleaving) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All of it, a segment at a time."""
    items, numbers, position = [], [], 0
    while position < order.total:
        segment = order.segment(position)
        assert segment.start == position
        items.append(segment.items)
        numbers.append(segment.numbers)
        position += len(segment.items)
    return np.concatenate(items), np.concatenate(numbers)


@settings(max_examples=40, deadline=None)
@given(counts_of_items, st.integers(0, 2**62), st.integers(0, 10), st.floats(0, 1), st.sampled_from([1, GROUP_SIZE]))
def test_every_item_is_there_whole_and_in_its_own_order(counts: list[int], key: int, early: int, even_from: float, group: int) -> None:
    parts = np.linspace(0, early / 10, len(counts))
    items, numbers = read(Interleaving(np.array(counts), key, group, parts if even_from else None, even_from or 1.0))
    for item, count in enumerate(counts):
        assert numbers[items == item].tolist() == list(range(count))


@settings(max_examples=40, deadline=None)
@given(counts_of_items, st.integers(0, 2**62), st.floats(0, 1, exclude_max=True))
def test_a_segment_is_the_same_wherever_reading_begins(counts: list[int], key: int, where: float) -> None:
    items, numbers = read(Interleaving(np.array(counts), key))
    position = int(where * sum(counts))
    segment = Interleaving(np.array(counts), key).segment(position)
    part = slice(segment.start, segment.start + len(segment.items))
    assert part.start <= position < part.stop
    assert (segment.items == items[part]).all() and (segment.numbers == numbers[part]).all()


def test_the_order_does_not_depend_on_how_much_is_worked_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.array([2000, 900, 33, 1])
    found = []
    for at_once in (7, 128, 10**6):
        monkeypatch.setattr(module, "_GROUPS_AT_ONCE", at_once)
        found.append(read(Interleaving(counts, 5)))
    for items, numbers in found[1:]:
        assert (items == found[0][0]).all() and (numbers == found[0][1]).all()


def test_an_item_that_hurries_is_through_with_its_part_when_it_should_be() -> None:
    counts = np.array([4000, 4000])
    items, _ = read(Interleaving(counts, 3, GROUP_SIZE, np.array([1.0, 0.5]), even_from=0.75))
    assert abs((items[:6000] == 0).sum() - 4000) <= 2 * GROUP_SIZE
    assert abs((items[:3000] == 0).mean() - 2 / 3) < 0.01
    assert (items[6000 + 2 * GROUP_SIZE :] == 1).all()
