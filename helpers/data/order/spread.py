"""Many rows of micro-batches laid over one stretch of time, each as evenly as it can be, without writing the result down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from helpers.data.order.shuffle import fractions, hashed, key_words

# Micro-batches of one item that lie next to each other, so that the processes of one step mostly share a shape. Small, so that
# the training does not dwell on one shape; a constant, so that the order is the same on any number of processes.
GROUP_SIZE = 4

_GROUPS_AT_ONCE = 128  # that are worked out together; the order does not depend on it

Indices = NDArray[np.int64]
Fractions = NDArray[np.float64]


@dataclass(frozen=True)
class Stretch:
    """Some micro-batches in order, the first of them at position `start`. M of them."""

    start: int
    items: Indices  # (M,) whose they are
    numbers: Indices  # (M,) which of its own, from 0


class Spread:
    """The micro-batches of several items in one order, item i having `counts[i]`.

    Time runs from 0 to 1. The micro-batches of item i form groups of `group_sizes[i]`, the last one maybe smaller. Group j of g has its
    moment within the j-th of g equal parts of the item's time, drawn by `key`. So at any time each item is within one group of where an
    even spread has it, and the moment of a group needs no other group to be known.

    An item's own time need not run evenly: item i has gone through the part `early[i]` of its micro-batches at `even_from`, and goes
    through the rest evenly from there.
    """

    def __init__(
        self, counts: Indices, key: int, group_sizes: Indices | int = GROUP_SIZE, early: Fractions | None = None, even_from: float = 1.0
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        self._sizes = np.broadcast_to(np.asarray(group_sizes, np.int64), self.counts.shape)
        self._groups = -(-self.counts // self._sizes)
        self._slices = max(1, -(-int(self._groups.sum()) // _GROUPS_AT_ONCE))
        self._keys = hashed(key_words(key), np.arange(len(self.counts)))
        self._even_from = even_from
        self._early = np.ones(len(self.counts)) if early is None else early
        late = 1.0 - self._early
        self._early_pace = np.divide(even_from, self._early, out=np.zeros_like(late), where=self._early > 0)
        self._late_pace = np.divide(1.0 - even_from, late, out=np.zeros_like(late), where=late > 0)
        self._groups_before = lru_cache(maxsize=4)(self._counted)  # a slice begins where the one before it ended
        self._latest: Stretch | None = None

    def stretch(self, position: int) -> Stretch:
        """Some micro-batches around `position`, which is at least 0 and below `total`."""
        latest = self._latest
        if latest is None or not latest.start <= position < latest.start + len(latest.items):
            latest = self._latest = self._slice(self._slice_of(position))
        return latest

    def _slice_of(self, position: int) -> int:
        number = min(position * self._slices // self.total, self._slices - 1)  # nearly: each item is within a group of its even share
        while self._start(number) > position:
            number -= 1
        while self._start(number + 1) <= position:
            number += 1
        return number

    def _start(self, number: int) -> int:
        """The position of the first micro-batch at or after the beginning of a slice of time."""
        return int(np.minimum(self._groups_before(number) * self._sizes, self.counts).sum())

    def _slice(self, number: int) -> Stretch:
        first, end = self._groups_before(number), self._groups_before(number + 1)
        counts = end - first
        items = np.repeat(np.arange(len(counts)), counts)
        groups = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts - first, counts)
        by_moment = np.argsort(self._moments(items, groups), kind="stable")
        items, groups = items[by_moment], groups[by_moment]
        firsts = groups * self._sizes[items]
        sizes = np.minimum(self._sizes[items], self.counts[items] - firsts)
        offsets = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return Stretch(self._start(number), np.repeat(items, sizes), np.repeat(firsts, sizes) + offsets)

    def _counted(self, number: int) -> Indices:
        """(items,) the groups of each item whose moment is before a slice of time begins."""
        if number == self._slices:
            return self._groups
        time = number / self._slices
        if time < self._even_from:
            gone = self._early * (time / self._even_from)
        else:
            gone = self._early + (1.0 - self._early) * ((time - self._even_from) / (1.0 - self._even_from))
        # Only the group that is under way has to be looked at; its neighbours too, as the sum above is rounded and `_moments` decides.
        under_way = np.floor(gone * self._groups).astype(np.int64)
        near = under_way[:, None] + np.array([-1, 0, 1])
        there = (near >= 0) & (near < self._groups[:, None])
        items = np.broadcast_to(np.arange(len(near))[:, None], near.shape)
        before = there.copy()
        before[there] = self._moments(items[there], near[there]) < time
        return np.maximum(under_way - 1, 0) + before.sum(axis=1)

    def _moments(self, items: Indices, groups: Indices) -> Fractions:
        """When each group has its turn, in [0, 1]; not falling with the group's number. Exact to the bit: + - * / on float64."""
        gone = (groups + fractions(hashed(self._keys[items], groups))) / self._groups[items]
        early = np.minimum(gone * self._early_pace[items], self._even_from)
        late = self._even_from + (gone - self._early[items]) * self._late_pace[items]
        return np.where(gone < self._early[items], early, late)
