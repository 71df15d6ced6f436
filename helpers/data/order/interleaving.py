"""Several sequences of micro-batches merged into one, each spread evenly over it, without ever storing the whole.

    order = Interleaving(counts=[6, 3], key=1, group_sizes=1)
    order.segment(0).items  # [0, 1, 0, 0, 1, 0, 1, 0, 0]: item 0 six times, item 1 three times

`EpochOrder` uses it twice: to merge datasets into an epoch, and to merge the buckets of a dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from helpers.data.order.permutation import fractions, hashed, key_array

# Consecutive micro-batches of one item, so that the processes of a step mostly train on the same shape. Small, so that training does not
# stay with one shape for long. Constant, so that the order does not depend on the number of processes.
GROUP_SIZE = 4

_GROUPS_AT_ONCE = 128  # computed together; the order does not depend on it

Indices = NDArray[np.int64]
Fractions = NDArray[np.float64]


@dataclass(frozen=True)
class Segment:
    """M consecutive micro-batches of an interleaving. The first one is at position `start`."""

    start: int
    items: Indices  # (M,) the item each belongs to
    numbers: Indices  # (M,) its number within the item, from 0


class Interleaving:
    """The micro-batches of several items in one order. Item i has `counts[i]` of them, and they stay in their own order.

    How: think of the whole order as the time from 0 to 1. The micro-batches of item i are cut into groups of `group_sizes[i]`; the last
    group may be smaller. If there are g groups, group j gets a random time, drawn with `key`, within [j/g, (j+1)/g). Sorting all groups of
    all items by time gives the order. So an item is never more than one group away from a perfectly even spread, and the time of a group
    can be computed without looking at any other group.

    Items need not be spread evenly over the whole time: the share `early[i]` of item i's micro-batches comes before the time `even_from`,
    the rest after it, each part evenly. This is how a dataset with a `probability` is drawn more often until it is used up.
    """

    def __init__(
        self, counts: Indices, key: int, group_sizes: Indices | int = GROUP_SIZE, early: Fractions | None = None, even_from: float = 1.0
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        self._sizes = np.broadcast_to(np.asarray(group_sizes, np.int64), self.counts.shape)
        self._groups = -(-self.counts // self._sizes)
        self._slices = max(1, -(-int(self._groups.sum()) // _GROUPS_AT_ONCE))
        self._keys = hashed(key_array(key), np.arange(len(self.counts)))
        self._even_from = even_from
        self._early = np.ones(len(self.counts)) if early is None else early
        late = 1.0 - self._early
        self._early_pace = np.divide(even_from, self._early, out=np.zeros_like(late), where=self._early > 0)
        self._late_pace = np.divide(1.0 - even_from, late, out=np.zeros_like(late), where=late > 0)
        self._groups_before = lru_cache(maxsize=4)(self._count_groups_before)  # the end of one slice is the start of the next
        self._latest: Segment | None = None

    def segment(self, position: int) -> Segment:
        """A segment that contains `position`, which is at least 0 and below `total`."""
        latest = self._latest
        if latest is None or not latest.start <= position < latest.start + len(latest.items):
            latest = self._latest = self._slice(self._slice_of(position))
        return latest

    def _slice_of(self, position: int) -> int:
        # A first guess, and close: no item is far from an even spread.
        number = min(position * self._slices // self.total, self._slices - 1)
        while self._start(number) > position:
            number -= 1
        while self._start(number + 1) <= position:
            number += 1
        return number

    def _start(self, number: int) -> int:
        """The position of the first micro-batch at or after the start of a slice of time."""
        return int(np.minimum(self._groups_before(number) * self._sizes, self.counts).sum())

    def _slice(self, number: int) -> Segment:
        first, end = self._groups_before(number), self._groups_before(number + 1)
        counts = end - first
        items = np.repeat(np.arange(len(counts)), counts)
        groups = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts - first, counts)
        by_time = np.argsort(self._times(items, groups), kind="stable")
        items, groups = items[by_time], groups[by_time]
        firsts = groups * self._sizes[items]
        sizes = np.minimum(self._sizes[items], self.counts[items] - firsts)
        offsets = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return Segment(self._start(number), np.repeat(items, sizes), np.repeat(firsts, sizes) + offsets)

    def _count_groups_before(self, number: int) -> Indices:
        """(items,) the number of each item's groups whose time is before the start of a slice."""
        if number == self._slices:
            return self._groups
        time = number / self._slices
        if time < self._even_from:
            gone = self._early * (time / self._even_from)
        else:
            gone = self._early + (1.0 - self._early) * ((time - self._even_from) / (1.0 - self._even_from))
        # Only the group around this time is in doubt. Its neighbors are checked too, because `gone` is rounded; `_times` decides.
        current = np.floor(gone * self._groups).astype(np.int64)
        near = current[:, None] + np.array([-1, 0, 1])
        there = (near >= 0) & (near < self._groups[:, None])
        items = np.broadcast_to(np.arange(len(near))[:, None], near.shape)
        before = there.copy()
        before[there] = self._times(items[there], near[there]) < time
        return np.maximum(current - 1, 0) + before.sum(axis=1)

    def _times(self, items: Indices, groups: Indices) -> Fractions:
        """The time of each group, in [0, 1], never smaller than that of the item's group before it.

        Only + - * / on float64, so it is exact to the bit on every machine.
        """
        gone = (groups + fractions(hashed(self._keys[items], groups))) / self._groups[items]
        early = np.minimum(gone * self._early_pace[items], self._even_from)
        late = self._even_from + (gone - self._early[items]) * self._late_pace[items]
        return np.where(gone < self._early[items], early, late)
