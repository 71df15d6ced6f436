"""The order of training as a pure function of the seed: no state is kept between steps, so a resumed run continues exactly.

    order = EpochOrder(shapes=[0, 0, 0, 0, 0, 1, 1], datasets=[0] * 7, shares=[Share()], batch_size=2, seed=42)
    order.step(0)  # one process: [MicroBatch with samples [6, 5]]
    order.step(0, rank=1, world_size=2)  # the second of two processes: [MicroBatch with samples [3, 4]]

An epoch is a list of micro-batches. It depends only on the plan, the batch size, the shares of the datasets, the seed and the number of
the epoch: not on the number of processes, and not on what was trained before. A step consists of the next accumulation x processes
micro-batches, and may cross the end of an epoch. The first epoch starts at step 0, or later if a run was resumed with changed data: see
`OrderStart`.

An epoch is never stored as a list. The samples of one dataset and one shape form a *bucket*. Two functions give the micro-batches:
`Interleaving` says which dataset comes next, and which of its buckets; a keyed permutation says which samples of the bucket. Both are
computed in short segments, so a step costs the same for a hundred samples and for a hundred million, at any point of an epoch.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helpers.data.base.draws import seed_of
from helpers.data.order.interleaving import GROUP_SIZE, Interleaving, Segment
from helpers.data.order.permutation import Hashes, hashed, key_array, permuted

Indices = NDArray[np.int64]
ShapesOf = Callable[[int], ArrayLike]

_FEW = 16 * GROUP_SIZE  # a dataset with fewer micro-batches in an epoch is not grouped
_MOST = 2**48  # micro-batches of a dataset with `ignore_epochs` in one epoch: never reached, and still exact as float64
_ROWS_AT_ONCE = 1 << 18  # of the plan, when rows are sorted by bucket


@dataclass(frozen=True)
class OrderStart:
    """Where an order starts: the first micro-batch of epoch `epoch` is the first one of step `step`. Both count from 0."""

    step: int = 0
    epoch: int = 0


FROM_THE_BEGINNING = OrderStart()


@dataclass(frozen=True)
class Share:
    """How often a dataset is drawn.

    Each sample appears `repeats` + 1 times in an epoch. `probability` is the chance that the next micro-batch comes from this dataset,
    relative to the other datasets. It holds until the first dataset is used up; what the others have left is then spread evenly over the
    rest of the epoch. If no dataset has a probability, all are spread evenly over the whole epoch.
    A dataset with `ignore_epochs` does not decide when an epoch ends. It is drawn by its probability throughout, continues in the next
    epoch with the samples not seen yet, and starts again when all have been seen.
    """

    repeats: int = 0
    probability: float | None = None
    ignore_epochs: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """B samples of one dataset and one shape, which go through the network together.

    `places` are their positions in the global step, counted from 0 over all processes and accumulation rounds. The step has
    `step_samples` samples.
    """

    epoch: int
    samples: Indices  # (B,) rows of the plan
    repeats: Indices  # (B,) how often the sample has appeared in this epoch before
    places: tuple[int, ...]
    step_samples: int


class EpochOrder:
    """The samples of every micro-batch of every epoch. For one thread; another thread uses a `copy`.

    `shapes` (N,) is the shape number of each sample of the plan. If shapes are redrawn every epoch, it is a function of the epoch; it is
    called for all epochs from 0 up to the one asked for, because epochs may then have different numbers of micro-batches. `datasets` (N,)
    is the dataset number of each sample, and `shares[d]` says how often dataset d is drawn. Every sample of a dataset without
    `ignore_epochs` appears exactly `repeats` + 1 times an epoch. One micro-batch of each bucket may be smaller than `batch_size`.
    ValueError for arguments that give no order.
    """

    def __init__(self, shapes: ArrayLike | ShapesOf, datasets: ArrayLike, shares: Sequence[Share], batch_size: int, seed: int) -> None:
        self._datasets = np.asarray(datasets)
        if len(self._datasets) == 0 or batch_size < 1 or any(share.repeats < 0 for share in shares):
            raise ValueError(
                f"an order needs samples, a batch size above 0 and repeats of 0 or more, not {len(self._datasets)} and {batch_size}"
            )
        if not any(_weight(share) > 0 and not share.ignore_epochs for share in shares):
            raise ValueError("an order needs a dataset without ignore_epochs whose probability is above 0")
        self._shapes = shapes
        self._shares = shares
        self._batch_size = batch_size
        self._seed = seed
        self._before = [0]  # [i]: micro-batches before epoch i, for the epochs asked for so far
        self._counting = threading.Lock()  # the thread that builds batches asks, and the one that saves checkpoints
        # Two of each: a step may contain the end of one epoch and the start of the next.
        self._buckets_of = lru_cache(maxsize=2 if callable(shapes) else 1)(self._gathered_buckets)
        self._epoch = lru_cache(maxsize=2)(self._new_epoch)

    def copy(self) -> EpochOrder:
        """The same order, for another thread."""
        return EpochOrder(self._shapes, self._datasets, self._shares, self._batch_size, self._seed)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Number of micro-batches in epoch 0. Other epochs may have more or fewer if shapes are redrawn every epoch."""
        return self.micro_batches(0, 1)

    @property
    def mix(self) -> Mix:
        """How datasets are mixed in epoch 0."""
        return self._buckets_of(0).mix

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples in epoch 0, repeats included, datasets with `ignore_epochs` excluded."""
        return self._buckets_of(0).samples

    def micro_batches(self, first_epoch: int, end_epoch: int) -> int:
        """Number of micro-batches in the epochs from `first_epoch` to `end_epoch` - 1."""
        return self._micro_batches_before(end_epoch) - self._micro_batches_before(first_epoch)

    def step(
        self, step: int, rank: int = 0, world_size: int = 1, accumulation: int = 1, start: OrderStart = FROM_THE_BEGINNING
    ) -> list[MicroBatch]:
        """The `accumulation` micro-batches of one process in a step, which is not before `start.step`. None of them is empty."""
        per_step = accumulation * world_size
        first = self._micro_batches_before(start.epoch) + (step - start.step) * per_step
        found = self._at(first, per_step)
        ends = list(accumulate(part.sizes[at] for part, at in found))
        return [_micro_batch(*found[i], last_place=ends[i], step_samples=ends[-1]) for i in range(rank, per_step, world_size)]

    def untouched_epoch(self, steps: int, micro_batches_per_step: int, start: OrderStart = FROM_THE_BEGINNING) -> int:
        """The first epoch of which no micro-batch is in the first `steps` steps."""
        done = self._micro_batches_before(start.epoch) + (steps - start.step) * micro_batches_per_step
        epoch, position = self._place(done)
        return epoch + (position > 0)

    # -- positions: micro-batches counted over all epochs ----------------------------------------------------------------

    def _micro_batches_before(self, epoch: int) -> int:
        if not callable(self._shapes):
            return epoch * self._buckets_of(0).micro_batches
        with self._counting:
            while len(self._before) <= epoch:
                self._before.append(self._before[-1] + self._count(len(self._before) - 1))
        return self._before[epoch]

    def _place(self, position: int) -> tuple[int, int]:
        """The epoch that contains a position, and the position within it."""
        if not callable(self._shapes):
            return divmod(position, self._buckets_of(0).micro_batches)
        while self._before[-1] <= position:
            self._micro_batches_before(len(self._before))
        epoch = bisect_right(self._before, position) - 1
        return epoch, position - self._before[epoch]

    def _at(self, position: int, count: int) -> list[tuple[_Part, int]]:
        """`count` micro-batches from a position on, each as a part of an epoch and an index into the part."""
        found: list[tuple[_Part, int]] = []
        while len(found) < count:
            epoch, inside = self._place(position + len(found))
            part = self._epoch(epoch).part(inside)
            first = inside - part.start
            found += [(part, at) for at in range(first, min(len(part.sizes), first + count - len(found)))]
        return found

    # -- epochs ----------------------------------------------------------------------------------------------------------

    def _new_epoch(self, epoch: int) -> _Epoch:
        buckets = self._buckets_of(epoch if callable(self._shapes) else 0)
        return _Epoch(epoch, buckets, self._seed)

    def _count(self, epoch: int) -> int:
        return _Buckets(self._shapes_in(epoch), self._datasets, self._shares, self._batch_size).micro_batches

    def _gathered_buckets(self, epoch: int) -> _Buckets:
        buckets = _Buckets(self._shapes_in(epoch), self._datasets, self._shares, self._batch_size)
        buckets.gather()
        return buckets

    def _shapes_in(self, epoch: int) -> NDArray[Any]:
        shapes = np.asarray(self._shapes(epoch) if callable(self._shapes) else self._shapes)
        if shapes.shape != self._datasets.shape:
            raise ValueError(f"an order needs one shape for each of the {len(self._datasets):,} samples, not {len(shapes):,}")
        return shapes


class _Buckets:
    """The samples of a plan grouped by dataset and shape.

    The counts are computed at once, the rows only by `gather`: bucket k then has the rows `rows[starts[k] : starts[k] + counts[k]]`.
    """

    def __init__(self, shapes: NDArray[Any], datasets: NDArray[Any], shares: Sequence[Share], batch_size: int) -> None:
        self._shapes, self._datasets = shapes, datasets
        self._width = 1 + max(int(part.max()) for part in _pieces(shapes))
        found = np.zeros(self._width * len(shares), np.int64)
        for keys in self._keys():
            found += np.bincount(keys, minlength=len(found))
        keys = np.flatnonzero(found)
        self._number = np.zeros(len(found), np.int64)
        self._number[keys] = np.arange(len(keys))
        self.shape = keys % self._width
        self.counts = found[keys]
        self.starts = np.cumsum(self.counts) - self.counts
        dataset = keys // self._width
        self.entries = self.counts * (np.array([share.repeats for share in shares])[dataset] + 1)
        self.batch_size = batch_size
        self.batches = -(-self.entries // batch_size)
        self.first = np.searchsorted(dataset, np.arange(len(shares) + 1))  # dataset d has the buckets first[d] .. first[d + 1] - 1
        self.own = np.array([int(self.batches[a:b].sum()) for a, b in pairwise(self.first)])  # micro-batches in one pass over each dataset
        # of datasets without ignore_epochs
        self.samples = int(
            self.entries[np.array([not share.ignore_epochs for share in shares])[dataset]].sum()
        )  # without datasets that have ignore_epochs
        self.mix = Mix(self.own, shares)
        self.micro_batches = int(self.mix.counts.sum())

    def gather(self) -> None:
        """Sort the rows by bucket, a piece of the plan at a time. Takes four bytes a sample, and little more during the sort."""
        self.rows = np.empty(len(self._shapes), np.uint32 if len(self._shapes) < 2**32 else np.int64)
        free, at = self.starts.copy(), 0
        for keys in self._keys():
            number = self._number[keys].astype(np.uint16 if len(self.counts) <= 2**16 else np.int64)  # NumPy has a radix sort for 16 bits
            by_bucket = np.argsort(number, kind="stable")
            here = np.bincount(number, minlength=len(free))
            target = np.repeat(free - (np.cumsum(here) - here), here) + np.arange(len(keys))
            self.rows[target] = by_bucket + at
            free += here
            at += len(keys)

    def _keys(self) -> Iterator[Indices]:
        for shapes, datasets in zip(_pieces(self._shapes), _pieces(self._datasets), strict=True):
            yield datasets.astype(np.int64) * self._width + shapes


class Mix:
    """How datasets are mixed in an epoch. `own` (datasets,) is the number of micro-batches in one pass over each dataset.

    `counts` (datasets,) is the number of micro-batches of each dataset in the epoch. With the epoch as the time from 0 to 1, the first
    dataset is used up at `even_from`; by then the share `early[d]` of dataset d is used up. Without probabilities all end at 1.
    """

    def __init__(self, own: Indices, shares: Sequence[Share]) -> None:
        counting = np.array([not share.ignore_epochs for share in shares])
        self.counts = own.copy()
        self.early = np.ones(len(own))
        self.even_from = 1.0
        if all(share.probability is None for share in shares):
            return
        weights = np.array([_weight(share) for share in shares])
        drawn = counting & (weights > 0) & (own > 0)
        if not drawn.any():
            raise ValueError("no dataset without ignore_epochs and with a probability above 0 has a sample")
        shortest = (own[drawn] / weights[drawn]).min()
        total = own[counting].sum()
        self.early = np.where(counting, np.minimum(weights * shortest / np.maximum(own, 1), 1.0), 1.0)
        self.even_from = float(min((self.early * own)[counting].sum() / total, 1.0))
        self.early[~counting] = self.even_from  # drawn at the same rate to the end
        asked = np.clip(np.rint(total * weights / weights[drawn].sum()), 1, _MOST).astype(np.int64)
        self.counts = np.where(counting, own, np.where(own > 0, asked, 0))


@dataclass(frozen=True)
class _Part:
    """M consecutive micro-batches of an epoch, with E samples in total. The first one is at position `start`."""

    epoch: int
    start: int
    sizes: list[int]  # (M,)
    firsts: list[int]  # (M,) index of the first sample of each
    samples: Indices  # (E,) rows of the plan
    repeats: Indices  # (E,)


class _Epoch:
    """The micro-batches of one epoch, computed a segment at a time."""

    def __init__(self, number: int, buckets: _Buckets, seed: int) -> None:
        self.number = number
        self.buckets = buckets
        self.seed = seed
        mix = buckets.mix
        # Small datasets are not grouped: in groups of four, a dozen micro-batches would come in three lumps.
        groups = np.where(mix.counts < _FEW, 1, GROUP_SIZE)
        self.datasets = Interleaving(mix.counts, seed_of("order/data sets", seed, number), groups, mix.early, mix.even_from)
        self._pass = lru_cache(maxsize=2 * len(mix.counts))(self._new_pass)
        self._latest: _Part | None = None

    def part(self, position: int) -> _Part:
        """A part that contains the micro-batch at `position`."""
        latest = self._latest
        if latest is None or not latest.start <= position < latest.start + len(latest.sizes):
            latest = self._latest = self._compute(self.datasets.segment(position))
        return latest

    def _compute(self, segment: Segment) -> _Part:
        buckets = self.buckets
        bucket, number, rounds = (np.empty_like(segment.items) for _ in range(3))
        key = np.empty(len(segment.items), np.uint64)
        for dataset in np.unique(segment.items).tolist():
            here = np.flatnonzero(segment.items == dataset)
            bucket[here], number[here], rounds[here], key[here] = self._run(dataset, int(segment.numbers[here[0]]), len(here))
        # The smaller micro-batch of a bucket comes at a random place, not always at the end.
        missing = buckets.batches[bucket] * buckets.batch_size - buckets.entries[bucket]
        short = (hashed(key, 0) % buckets.batches[bucket].astype(np.uint64)).astype(np.int64)
        size = buckets.batch_size - np.where(number == short, missing, 0)
        first = number * buckets.batch_size - np.where(number > short, missing, 0)
        ends = np.cumsum(size)
        place = np.arange(int(ends[-1])) + np.repeat(first - (ends - size), size)
        bucket = np.repeat(bucket, size)
        entry = permuted(place, buckets.entries[bucket], np.repeat(hashed(key, 1), size))
        repeat, row = np.divmod(entry, buckets.counts[bucket])
        repeat += np.repeat(rounds, size) * (buckets.entries[bucket] // buckets.counts[bucket])
        samples = buckets.rows[buckets.starts[bucket] + row].astype(np.int64)
        return _Part(self.number, segment.start, size.tolist(), (ends - size).tolist(), samples, repeat)

    def _run(self, dataset: int, first: int, count: int) -> tuple[Indices, Indices, Indices, Hashes]:
        """`count` micro-batches of a dataset, from number `first` of this epoch on: bucket, number in the bucket, pass, key of the pass.

        A dataset has one pass an epoch. One with `ignore_epochs` continues the pass of the epoch before. Passes count from the one that
        the epoch starts in.
        """
        own = int(self.buckets.own[dataset])
        start = self.number * int(self.buckets.mix.counts[dataset])
        at = start + first
        found: list[tuple[Indices, Indices, Indices, Hashes]] = []
        missing = count
        while missing:
            through, position = divmod(at + count - missing, own)
            interleaving, keys = self._pass(dataset, through)
            segment = interleaving.segment(position)
            run = slice(position - segment.start, position - segment.start + missing)
            items = segment.items[run]
            rounds = np.full(len(items), through - start // own)
            found.append((items + self.buckets.first[dataset], segment.numbers[run], rounds, keys[items]))
            missing -= len(items)
        bucket, number, rounds, key = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return bucket, number, rounds, key

    def _new_pass(self, dataset: int, through: int) -> tuple[Interleaving, Hashes]:
        """One pass over a dataset, and a key for each of its buckets."""
        of_dataset = slice(self.buckets.first[dataset], self.buckets.first[dataset + 1])
        interleaving = Interleaving(self.buckets.batches[of_dataset], seed_of("order/buckets", self.seed, dataset, through))
        key = key_array(seed_of("order/samples", self.seed, dataset, through))
        return interleaving, hashed(key, self.buckets.shape[of_dataset])


def _weight(share: Share) -> float:
    return 1.0 if share.probability is None else share.probability


def _micro_batch(part: _Part, at: int, last_place: int, step_samples: int) -> MicroBatch:
    first, size = part.firsts[at], part.sizes[at]
    places = tuple(range(last_place - size, last_place))
    return MicroBatch(part.epoch, part.samples[first : first + size], part.repeats[first : first + size], places, step_samples)


def _pieces(column: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """A column in pieces: a memory-mapped column is never read into memory as a whole."""
    for start in range(0, len(column), _ROWS_AT_ONCE):
        yield column[start : start + _ROWS_AT_ONCE]
