"""Which unit is encoded next, and by which process.

Units are met in the order of training, each with the first of its rows. Every process walks through the micro-batches of all processes
and takes every n-th unit it meets, so shares are disjoint and processes need not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from helpers.data.base.workers import Workers
from helpers.data.encode.store import EVERY_EPOCH, EpochLatents, LatentStore, Unit
from helpers.data.order.epoch_order import MicroBatch


class Walk:
    """One walk through the order of training. Yields units of this process's share that lack something."""

    def __init__(self, store: LatentStore, workers: Workers) -> None:
        self.epoch = 0  # of the last micro-batch
        self._store = store
        self._workers = workers
        self._count = 0  # units met so far
        self._met: dict[int, NDArray[np.bool_]] = {}  # by the number of their epoch: which of its units were met
        self._left: dict[int, int] = {}  # likewise: how many were not

    def needed(self, micro: MicroBatch, only: int | None = None) -> Iterator[Unit]:
        """Of the units that a micro-batch needs and no earlier one did; `only` names the one `EpochLatents.number` to look at."""
        if micro.epoch != self.epoch:
            self.epoch = micro.epoch
            self._met = {number: met for number, met in self._met.items() if number == EVERY_EPOCH or number >= micro.epoch}
        for row in micro.samples.tolist():
            number = self._store.number(row, micro.epoch)
            if only is None or number == only:
                latents = self._store.at(number)
                yield from self._meet(latents, int(latents.unit_of[row]))

    def rest(self, latents: EpochLatents) -> Iterator[Unit]:
        """Of the units that were not met, in the order of the plan."""
        for unit in np.flatnonzero(~self._met_of(latents)).tolist():
            yield from self._meet(latents, unit)

    @property
    def is_over(self) -> bool:
        """Whether no epoch needs another unit."""
        return not any(self._store.redrawn) and self._left.get(EVERY_EPOCH) == 0

    def _meet(self, latents: EpochLatents, index: int) -> Iterator[Unit]:
        met = self._met_of(latents)
        if met[index]:
            return
        met[index] = True
        self._left[latents.number] -= 1
        is_mine = self._count % self._workers.world_size == self._workers.rank
        self._count += 1
        unit = latents.units[index]
        if is_mine and latents.lacks(unit.rows):
            yield unit

    def _met_of(self, latents: EpochLatents) -> NDArray[np.bool_]:
        if latents.number not in self._met:
            self._met[latents.number] = np.zeros(len(latents.units), dtype=bool)
            self._left[latents.number] = len(latents.units)
        return self._met[latents.number]
