"""Shuffled orders that are computed and not kept: which of n things stands at a place, without a list of the others.

Everything is arithmetic on 64-bit integers, so it is the same on every machine and under every version of NumPy.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]
Indices = NDArray[np.int64]

ROUNDS = 8
FEW = 256  # up to so many things a shuffle is a sorted table: over a handful of bits the network below would miss many orders

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hashed(key: Words, number: ArrayLike) -> Words:
    """A word for each pair of a key and a number below 2^63, of shapes that broadcast: Steele et al. (2014), SplitMix64."""
    word = np.asarray(key, np.uint64) + (np.atleast_1d(np.asarray(number)).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    return word ^ (word >> np.uint64(31))


def key_words(key: int) -> Words:
    """(1,) a key as `hashed` takes it."""
    return np.array([key], dtype=np.uint64)


def fractions(words: Words) -> NDArray[np.float64]:
    """Numbers in [0, 1) of 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(places: Indices, counts: Indices, keys: Words) -> Indices:
    """(E,) which of `counts` things, from 0, stands at each place of the shuffle with that key; each place is below its count.

    For one key and one count, the places from 0 up to the count give each thing exactly once.
    """
    result = np.empty(len(places), np.int64)
    few = counts <= FEW
    if few.any():
        result[few] = _looked_up(places[few], counts[few], keys[few])
    if not few.all():
        result[~few] = _networked(places[~few], counts[~few], keys[~few])
    return result


def _looked_up(places: Indices, counts: Indices, keys: Words) -> Indices:
    distinct, first, which = np.unique(hashed(keys, counts), return_index=True, return_inverse=True)
    tables = [_table(int(key), int(count)) for key, count in zip(distinct, counts[first], strict=True)]
    starts = np.cumsum([0, *(len(table) for table in tables[:-1])])
    return np.concatenate(tables)[starts[which] + places]


@lru_cache(maxsize=4096)
def _table(key: int, count: int) -> Indices:
    return np.argsort(hashed(key_words(key), np.arange(count)), kind="stable")


def _networked(places: Indices, counts: Indices, keys: Words) -> Indices:
    """A Feistel network over the smallest even number of bits that hold the count, walked until it lands below the count.

    Black & Rogaway (2002), "Ciphers with arbitrary finite domains", section 4: cycle walking keeps it a permutation. As at least a
    quarter of the numbers are below the count, it takes four rounds of walking at most on average.
    """
    half = np.array((np.frexp((counts - 1).astype(np.float64))[1] + 1) // 2, np.uint64)  # bits of each half
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
