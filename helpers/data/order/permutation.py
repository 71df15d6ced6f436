"""Keyed pseudo-random permutations of 0 .. n-1, one value at a time: the value at a position, without a list of the other n-1.

    permuted(places=[0, 1, 2, 3, 4], counts=[5] * 5, keys=[7] * 5)  # [1, 2, 4, 0, 3]
    permuted(places=[3], counts=[5], keys=[7])  # [0], the same as above

All arithmetic is on 64-bit integers, so the result is the same on every machine and with every version of NumPy.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]

ROUNDS = 8  # of the Feistel network
FEW = 256  # up to this count a permutation is a sorted table: on so few bits the Feistel network reaches only some of the permutations

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hashed(key: Hashes, number: ArrayLike) -> Hashes:
    """A 64-bit hash of each pair of a key and a number below 2^63; the shapes broadcast. SplitMix64: Steele et al. (2014)."""
    word = np.asarray(key, np.uint64) + (np.atleast_1d(np.asarray(number)).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    return word ^ (word >> np.uint64(31))


def key_array(key: int) -> Hashes:
    """A key of shape (1,), as `hashed` takes it."""
    return np.array([key], dtype=np.uint64)


def fractions(hashes: Hashes) -> NDArray[np.float64]:
    """Hashes as float64 in [0, 1), from their upper 53 bits."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(places: Indices, counts: Indices, keys: Hashes) -> Indices:
    """For each of E elements, the value at position `places` of the permutation of 0 .. counts - 1 that belongs to the key. All (E,).

    Each place is at least 0 and below its count. For one key and one count, the places 0 .. count - 1 give every value exactly once.
    """
    result = np.empty(len(places), np.int64)
    few = counts <= FEW
    if few.any():
        result[few] = _from_tables(places[few], counts[few], keys[few])
    if not few.all():
        result[~few] = _from_feistel(places[~few], counts[~few], keys[~few])
    return result


def _from_tables(places: Indices, counts: Indices, keys: Hashes) -> Indices:
    distinct, first, which = np.unique(hashed(keys, counts), return_index=True, return_inverse=True)
    tables = [_table(int(key), int(count)) for key, count in zip(distinct, counts[first], strict=True)]
    starts = np.cumsum([0, *(len(table) for table in tables[:-1])])
    return np.concatenate(tables)[starts[which] + places]


@lru_cache(maxsize=4096)
def _table(key: int, count: int) -> Indices:
    return np.argsort(hashed(key_array(key), np.arange(count)), kind="stable")


def _from_feistel(places: Indices, counts: Indices, keys: Hashes) -> Indices:
    """A Feistel network over the smallest even number of bits that can hold the count, applied until the result is below the count.

    This is cycle walking, which keeps it a permutation: Black & Rogaway (2002), "Ciphers with arbitrary finite domains", section 4. At
    least a quarter of the network's values are below the count, so it takes at most four applications on average.
    """
    half = np.array((np.frexp((counts - 1).astype(np.float64))[1] + 1) // 2, np.uint64)  # bits in each half
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [hashed(keys, number) for number in range(ROUNDS)]
    result = places.astype(np.uint64)
    walking = np.arange(len(places))
    while len(walking):
        bits, low = half[walking], mask[walking]
        left, right = result[walking] >> bits, result[walking] & low
        for key in round_keys:
            left, right = right, left ^ (hashed(key[walking], right) & low)
        result[walking] = (left << bits) | right
        walking = walking[result[walking] >= counts[walking].astype(np.uint64)]
    return result.astype(np.int64)
