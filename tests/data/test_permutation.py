"""Computed permutations, as properties: each value once, every position equally likely, no trace of the original order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.data.order.permutation import FEW, Hashes, hashed, key_array, permuted


def whole(count: int, key: int) -> list[int]:
    return permuted(np.arange(count), np.full(count, count), np.full(count, key, np.uint64)).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_a_permutation_gives_each_value_once(count: int, key: int) -> None:
    assert sorted(whole(count, key)) == list(range(count))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 2**64 - 1)), min_size=1, max_size=20), st.integers(0, 10**6))
def test_many_permutations_computed_together_are_what_each_is_alone(permutations: list[tuple[int, int]], draw: int) -> None:
    counts = np.array([count for count, _ in permutations])
    keys = np.array([key for _, key in permutations], np.uint64)
    places = draw % counts
    together = permuted(places, counts, keys).tolist()
    assert together == [whole(count, key)[place] for (count, key), place in zip(permutations, places, strict=True)]


@pytest.mark.parametrize("count", [2, 3, 7, FEW, FEW + 1, 1000])
def test_each_thing_is_as_likely_as_any_other_at_each_place(count: int) -> None:
    """Chi-square over some places; 5 sigma of its distribution."""
    tries = 40 * count if count > 100 else 4000
    keys = hashed(key_array(count), np.arange(tries))
    for place in (0, count // 2, count - 1):
        found = permuted(np.full(tries, place), np.full(tries, count), keys)
        assert chi_square(np.bincount(found, minlength=count)) < count - 1 + 5 * np.sqrt(2 * (count - 1))


@pytest.mark.parametrize("count", [4, 7, FEW + 1, 1000])
def test_neighbours_do_not_stay_neighbours(count: int) -> None:
    """The distance of two things next to each other, taken round the circle, is as likely as any other."""
    tries = 40 * count if count > 100 else 4000
    keys: Hashes = hashed(key_array(count + 1), np.arange(tries))
    one, other = (permuted(np.full(tries, place), np.full(tries, count), keys) for place in (1, 2))
    distances = np.bincount((other - one) % count, minlength=count)
    assert distances[0] == 0
    assert chi_square(distances[1:]) < count - 2 + 5 * np.sqrt(2 * (count - 2))


def test_a_hundred_million_are_permuted_without_being_stored() -> None:
    count = 10**8 + 7
    places = np.arange(0, count, count // 1000)
    found = permuted(places, np.full(len(places), count), np.full(len(places), 5, np.uint64))
    assert len(set(found.tolist())) == len(places) and found.min() >= 0 and found.max() < count
    assert chi_square(np.bincount(found * 10 // count, minlength=10)) < 9 + 5 * np.sqrt(18)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())
