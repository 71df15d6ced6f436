"""Which micro-batches a step is made of, for one process and for all."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from helpers.data.order.epoch_order import EpochOrder, MicroBatch, OrderStart


@dataclass(frozen=True)
class Steps:
    """The order of training, cut into steps. Steps and epochs are counted from 0. Not to be shared between threads: see `copy`."""

    order: EpochOrder
    accumulation: int  # micro-batches of one process in a step
    rank: int = 0
    world_size: int = 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step, over all processes."""
        return self.accumulation * self.world_size

    def here(self, step: int, start: OrderStart) -> list[MicroBatch]:
        """The micro-batches of this process in a step."""
        return self.order.step(step, self.rank, self.world_size, self.accumulation, start)

    def all(self, first: int, start: OrderStart, end: int | None = None) -> Iterator[MicroBatch]:
        """The micro-batches of all processes from step `first` on, up to but without `end`, in the order of training."""
        for step in itertools.count(first) if end is None else range(first, end):
            yield from self.order.step(step, accumulation=self.micro_batches, start=start)

    def epoch(self, step: int, start: OrderStart) -> int:
        """The epoch that a step begins in."""
        return next(self.all(step, start)).epoch

    def copy(self) -> Steps:
        """The same for another thread."""
        return dataclasses.replace(self, order=self.order.copy())
