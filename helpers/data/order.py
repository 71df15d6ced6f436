"""The order of an epoch, as a function: nothing here is remembered between steps, so resuming is starting later.

An epoch is a list of micro-batches. It depends on the plan, the batch size, the seed and the epoch's number, and on nothing else:
not on the number of processes, not on what was trained before. Step s is made of the next G micro-batches, G being accumulation
times processes, and runs on across the end of an epoch. Only where a run goes on with changed data does an epoch begin at a later
step than at 0: see `OrderStart`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helpers.data.draws import seed_of

# Micro-batches of one shape that lie next to each other, so that the processes of one step mostly share a shape. Small, so that
# the training does not dwell on one shape; a constant, so that the order is the same on any number of processes.
GROUP_SIZE = 4

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class OrderStart:
    """Where an order begins: its first micro-batch is the first one of `epoch` and of step `step`, both counted from 0."""

    step: int = 0
    epoch: int = 0


FROM_THE_BEGINNING = OrderStart()


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one shape that go through the network together. B samples.

    `places` are their positions from 0 in the global step, which has `step_samples` samples over all processes and rounds.
    """

    epoch: int
    samples: Indices  # (B,) rows of the plan
    repeats: Indices  # (B,) which of its appearances in the epoch, from 0
    places: tuple[int, ...]
    step_samples: int


@dataclass(frozen=True)
class _Epoch:
    entries: Indices  # every appearance of every sample, shuffled, then gathered by shape
    batches: Indices  # micro-batches in training order, as indices into the columns that all epochs share


class EpochOrder:
    """Which samples stand in which micro-batch, for every epoch.

    `shapes` (N,) is the shape number of each sample of the plan, `repeats` (N,) how often it appears beyond the first time in an
    epoch. Every sample appears exactly `repeats + 1` times an epoch; the last micro-batch of a shape may be short.
    """

    def __init__(self, shapes: ArrayLike, repeats: ArrayLike, batch_size: int, seed: int) -> None:
        shapes = np.asarray(shapes, dtype=np.int64)
        views = np.asarray(repeats, dtype=np.int64) + 1
        if len(shapes) == 0 or batch_size < 1 or views.min() < 1:
            raise ValueError(f"an order needs samples, a batch size above 0 and repeats of 0 or more, not {len(shapes)} and {batch_size}")
        self.seed = seed
        self.samples_per_epoch = int(views.sum())
        self._sample = np.repeat(np.arange(len(shapes)), views)
        self._repeat = np.arange(self.samples_per_epoch) - np.repeat(np.cumsum(views) - views, views)
        self._shape = shapes[self._sample]
        self._starts, self._sizes, self._group = _cut(self._shape, batch_size)
        self.micro_batches_per_epoch = len(self._starts)
        self._built: dict[int, _Epoch] = {}

    def step(
        self, step: int, rank: int = 0, world_size: int = 1, accumulation: int = 1, start: OrderStart = FROM_THE_BEGINNING
    ) -> list[MicroBatch]:
        """The `accumulation` micro-batches that a process handles in step `step`, not before `start.step`; none of them is empty."""
        per_step = accumulation * world_size
        first = (step - start.step) * per_step
        epochs, positions = np.divmod(np.arange(first, first + per_step), self.micro_batches_per_epoch)
        epochs += start.epoch
        batches = [int(self._epoch(int(epoch)).batches[position]) for epoch, position in zip(epochs, positions, strict=True)]
        ends = np.cumsum(self._sizes[batches])
        return [
            self._micro_batch(int(epochs[i]), batches[i], last_place=int(ends[i]), step_samples=int(ends[-1]))
            for i in range(rank, per_step, world_size)
        ]

    def untouched_epoch(self, steps: int, micro_batches_per_step: int, start: OrderStart = FROM_THE_BEGINNING) -> int:
        """The first epoch that no micro-batch of the first `steps` steps belongs to."""
        return start.epoch + -(-(steps - start.step) * micro_batches_per_step // self.micro_batches_per_epoch)

    def _micro_batch(self, epoch: int, batch: int, last_place: int, step_samples: int) -> MicroBatch:
        start, size = int(self._starts[batch]), int(self._sizes[batch])
        entries = self._epoch(epoch).entries[start : start + size]
        places = tuple(range(last_place - size, last_place))
        return MicroBatch(epoch, self._sample[entries], self._repeat[entries], places, step_samples)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._built:
            while len(self._built) > 1:  # a step may hold the end of one epoch and the start of the next
                del self._built[min(self._built)]
            self._built[epoch] = self._shuffled(epoch)
        return self._built[epoch]

    def _shuffled(self, epoch: int) -> _Epoch:
        # Sorting by a bit generator's raw output: NumPy promises that stream for all its versions, but not what `shuffle` makes of
        # it, and a run may be resumed under another version.
        random = np.random.Philox(key=seed_of("order", self.seed, epoch))
        shuffled = np.argsort(random.random_raw(self.samples_per_epoch), kind="stable")
        entries = shuffled[np.argsort(self._shape[shuffled], kind="stable")]
        groups = np.argsort(random.random_raw(int(self._group[-1]) + 1), kind="stable")
        turn = np.empty_like(groups)
        turn[groups] = np.arange(len(groups))
        return _Epoch(entries, np.argsort(turn[self._group], kind="stable"))


def _cut(shape_of_entry: Indices, batch_size: int) -> tuple[Indices, Indices, Indices]:
    """Entries gathered by shape => start, size and group number of each micro-batch."""
    starts, sizes, groups = [], [], []
    first_entry = first_group = 0
    for count in np.bincount(shape_of_entry):
        offsets = np.arange(0, count, batch_size)
        starts.append(first_entry + offsets)
        sizes.append(np.minimum(batch_size, count - offsets))
        groups.append(first_group + np.arange(len(offsets)) // GROUP_SIZE)
        first_entry += int(count)
        first_group += -(-len(offsets) // GROUP_SIZE)
    return np.concatenate(starts), np.concatenate(sizes), np.concatenate(groups)
