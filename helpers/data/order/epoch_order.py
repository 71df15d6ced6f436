"""The order of an epoch, as a function: nothing here is remembered between steps, so resuming is starting later.

An epoch is a list of micro-batches. It depends on the plan, the batch size, the shares of the data sets, the seed and the epoch's
number, and on nothing else: not on the number of processes, not on what was trained before. Step s is made of the next G
micro-batches, G being accumulation times processes, and runs on across the end of an epoch. Only where a run goes on with changed
data does an epoch begin at a later step than at 0: see `OrderStart`.

No epoch is ever written down. Samples of one data set and one shape are a *bucket*. Which of its samples stand in its i-th
micro-batch is told by a keyed permutation (shuffle.py); when its turn comes is told by `Spread` (spread.py), twice: which data set
has the next micro-batch, and which of that data set's buckets. Both are worked out a small stretch at a time, so that a hundred
million samples cost as much a step as a hundred, at the end of an epoch too.
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
from helpers.data.order.shuffle import Words, hashed, key_words, shuffled
from helpers.data.order.spread import GROUP_SIZE, Spread, Stretch

Indices = NDArray[np.int64]
ShapesOf = Callable[[int], ArrayLike]

_FEW = 16 * GROUP_SIZE  # micro-batches of a data set in an epoch
_MOST = 2**48  # micro-batches of a data set that fills: an epoch that nobody sees the end of, in numbers that are still exact
_ROWS_AT_ONCE = 1 << 18  # of the plan, when buckets are gathered


@dataclass(frozen=True)
class OrderStart:
    """Where an order begins: its first micro-batch is the first one of `epoch` and of step `step`, both counted from 0."""

    step: int = 0
    epoch: int = 0


FROM_THE_BEGINNING = OrderStart()


@dataclass(frozen=True)
class Share:
    """How a data set takes part in an epoch.

    `repeats` is how often each sample appears beyond the first time. `probability` is the chance that the next micro-batch is of this
    data set, relative to the others; it holds until the first one is used up, and what is left by then is spread evenly over the rest
    of the epoch. Where no data set has one, all are spread evenly over the whole epoch. `fills` is for a data set that does not count:
    it keeps its probability to the end of the epoch, goes on in the next one where it stopped, and begins again when it is through.
    """

    repeats: int = 0
    probability: float | None = None
    fills: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one data set and one shape that go through the network together. B samples.

    `places` are their positions from 0 in the global step, which has `step_samples` samples over all processes and rounds.
    """

    epoch: int
    samples: Indices  # (B,) rows of the plan
    repeats: Indices  # (B,) which of its appearances in the epoch, from 0
    places: tuple[int, ...]
    step_samples: int


class EpochOrder:
    """Which samples stand in which micro-batch, for every epoch.

    `shapes` (N,) is the shape number of each sample of the plan, or a function that tells it for an epoch; it is asked for every epoch
    from 0 up to the one wanted, since epochs may then differ in their number of micro-batches. `datasets` (N,) is the number of each
    sample's data set, `shares[d]` how data set d takes part. Every sample of a data set that counts appears exactly `repeats + 1` times
    an epoch; one micro-batch of each bucket may be short.
    """

    def __init__(self, shapes: ArrayLike | ShapesOf, datasets: ArrayLike, shares: Sequence[Share], batch_size: int, seed: int) -> None:
        self._datasets = np.asarray(datasets)
        if len(self._datasets) == 0 or batch_size < 1 or any(share.repeats < 0 for share in shares):
            raise ValueError(
                f"an order needs samples, a batch size above 0 and repeats of 0 or more, not {len(self._datasets)} and {batch_size}"
            )
        if not any(_weight(share) > 0 and not share.fills for share in shares):
            raise ValueError("an order needs a data set that counts and has a probability above 0")
        self._shapes = shapes
        self._shares = shares
        self._batch_size = batch_size
        self._seed = seed
        self._before = [0]  # micro-batches before epoch i, as far as anyone asked
        self._counting = threading.Lock()  # the thread that makes batches asks, and the one that saves
        # Two of each: a step may hold the end of one epoch and the start of the next.
        self._buckets_of = lru_cache(maxsize=2 if callable(shapes) else 1)(self._gathered)
        self._epoch = lru_cache(maxsize=2)(self._begun)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Of epoch 0; where the shapes differ between epochs, other epochs may have more or fewer."""
        return self.micro_batches(0, 1)

    @property
    def mix(self) -> Mix:
        """Of epoch 0, as above."""
        return self._buckets_of(0).mix

    @property
    def samples_per_epoch(self) -> int:
        """Appearances of samples in an epoch, those of data sets that only fill left aside."""
        return self._buckets_of(0).samples

    def micro_batches(self, first_epoch: int, end_epoch: int) -> int:
        """How many the epochs from `first_epoch` up to but without `end_epoch` have together."""
        return self._micro_batches_before(end_epoch) - self._micro_batches_before(first_epoch)

    def step(
        self, step: int, rank: int = 0, world_size: int = 1, accumulation: int = 1, start: OrderStart = FROM_THE_BEGINNING
    ) -> list[MicroBatch]:
        """The `accumulation` micro-batches that a process handles in step `step`, not before `start.step`; none of them is empty."""
        per_step = accumulation * world_size
        first = self._micro_batches_before(start.epoch) + (step - start.step) * per_step
        found = self._at(first, per_step)
        ends = list(accumulate(part.sizes[at] for part, at in found))
        return [_micro_batch(*found[i], last_place=ends[i], step_samples=ends[-1]) for i in range(rank, per_step, world_size)]

    def untouched_epoch(self, steps: int, micro_batches_per_step: int, start: OrderStart = FROM_THE_BEGINNING) -> int:
        """The first epoch that no micro-batch of the first `steps` steps belongs to."""
        done = self._micro_batches_before(start.epoch) + (steps - start.step) * micro_batches_per_step
        epoch, position = self._place(done)
        return epoch + (position > 0)

    # -- positions: the micro-batches of all epochs, numbered through ----------------------------------------------------

    def _micro_batches_before(self, epoch: int) -> int:
        if not callable(self._shapes):
            return epoch * self._buckets_of(0).micro_batches
        with self._counting:
            while len(self._before) <= epoch:
                self._before.append(self._before[-1] + self._counted(len(self._before) - 1))
        return self._before[epoch]

    def _place(self, position: int) -> tuple[int, int]:
        """The epoch of a position, and the position in it."""
        if not callable(self._shapes):
            return divmod(position, self._buckets_of(0).micro_batches)
        while self._before[-1] <= position:
            self._micro_batches_before(len(self._before))
        epoch = bisect_right(self._before, position) - 1
        return epoch, position - self._before[epoch]

    def _at(self, position: int, count: int) -> list[tuple[_Part, int]]:
        """The `count` micro-batches from a position on, each as a part of an epoch and the place in it."""
        found: list[tuple[_Part, int]] = []
        while len(found) < count:
            epoch, inside = self._place(position + len(found))
            part = self._epoch(epoch).part(inside)
            first = inside - part.start
            found += [(part, at) for at in range(first, min(len(part.sizes), first + count - len(found)))]
        return found

    # -- epochs ----------------------------------------------------------------------------------------------------------

    def _begun(self, epoch: int) -> _Epoch:
        buckets = self._buckets_of(epoch if callable(self._shapes) else 0)
        return _Epoch(epoch, buckets, self._seed)

    def _counted(self, epoch: int) -> int:
        return _Buckets(self._shapes_in(epoch), self._datasets, self._shares, self._batch_size).micro_batches

    def _gathered(self, epoch: int) -> _Buckets:
        buckets = _Buckets(self._shapes_in(epoch), self._datasets, self._shares, self._batch_size)
        buckets.gather()
        return buckets

    def _shapes_in(self, epoch: int) -> NDArray[Any]:
        shapes = np.asarray(self._shapes(epoch) if callable(self._shapes) else self._shapes)
        if shapes.shape != self._datasets.shape:
            raise ValueError(f"an order needs one shape for each of its {len(self._datasets):,} samples, not {len(shapes):,}")
        return shapes


class _Buckets:
    """The samples of a plan by data set and shape: how many, how many micro-batches they make, and, once gathered, which they are.

    Bucket k holds the rows `rows[starts[k] : starts[k] + counts[k]]` of the plan.
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
        self.first = np.searchsorted(dataset, np.arange(len(shares) + 1))  # buckets of data set d: first[d] up to first[d + 1]
        self.own = np.array([int(self.batches[a:b].sum()) for a, b in pairwise(self.first)])  # micro-batches of a pass over each data set
        self.samples = int(self.entries[np.array([not share.fills for share in shares])[dataset]].sum())  # of data sets that count
        self.mix = Mix(self.own, shares)
        self.micro_batches = int(self.mix.counts.sum())

    def gather(self) -> None:
        """Sort the rows by bucket, a stretch of the plan at a time: four bytes a sample, and hardly more while it is done."""
        self.rows = np.empty(len(self._shapes), np.uint32 if len(self._shapes) < 2**32 else np.int64)
        free, at = self.starts.copy(), 0
        for keys in self._keys():
            number = self._number[keys].astype(np.uint16 if len(self.counts) <= 2**16 else np.int64)  # 16 bits are sorted by radix
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
    """How many micro-batches of each data set an epoch has, and how fast they go, from the micro-batches of one pass over each.

    In the time from 0 to 1, `even_from` is when the first data set is used up, and `early[d]` the part of data set d that is gone by
    then: 1 for that one. Where no data set has a probability, all are used up at 1.
    """

    def __init__(self, own: Indices, shares: Sequence[Share]) -> None:
        counting = np.array([not share.fills for share in shares])
        self.counts = own.copy()
        self.early = np.ones(len(own))
        self.even_from = 1.0
        if all(share.probability is None for share in shares):
            return
        weights = np.array([_weight(share) for share in shares])
        drawn = counting & (weights > 0) & (own > 0)
        if not drawn.any():
            raise ValueError("no data set that counts and has a probability above 0 has a sample")
        shortest = (own[drawn] / weights[drawn]).min()
        total = own[counting].sum()
        self.early = np.where(counting, np.minimum(weights * shortest / np.maximum(own, 1), 1.0), 1.0)
        self.even_from = float(min((self.early * own)[counting].sum() / total, 1.0))
        self.early[~counting] = self.even_from  # these keep their pace to the end
        asked = np.clip(np.rint(total * weights / weights[drawn].sum()), 1, _MOST).astype(np.int64)
        self.counts = np.where(counting, own, np.where(own > 0, asked, 0))


@dataclass(frozen=True)
class _Part:
    """Some micro-batches of an epoch in the order of training, the first of them at position `start`. M of them, E samples."""

    epoch: int
    start: int
    sizes: list[int]  # (M,)
    firsts: list[int]  # (M,) where the samples of each begin
    samples: Indices  # (E,) rows of the plan
    repeats: Indices  # (E,)


class _Epoch:
    """The micro-batches of one epoch, worked out a stretch at a time."""

    def __init__(self, number: int, buckets: _Buckets, seed: int) -> None:
        self.number = number
        self.buckets = buckets
        self.seed = seed
        mix = buckets.mix
        # Small data sets alternate with each micro-batch: in groups, a dozen of them would come in three lumps.
        groups = np.where(mix.counts < _FEW, 1, GROUP_SIZE)
        self.datasets = Spread(mix.counts, seed_of("order/data sets", seed, number), groups, mix.early, mix.even_from)
        self._pass = lru_cache(maxsize=2 * len(mix.counts))(self._begun)
        self._latest: _Part | None = None

    def part(self, position: int) -> _Part:
        """A part with the micro-batch at `position` in it."""
        latest = self._latest
        if latest is None or not latest.start <= position < latest.start + len(latest.sizes):
            latest = self._latest = self._worked_out(self.datasets.stretch(position))
        return latest

    def _worked_out(self, stretch: Stretch) -> _Part:
        buckets = self.buckets
        bucket, number, rounds = (np.empty_like(stretch.items) for _ in range(3))
        key = np.empty(len(stretch.items), np.uint64)
        for dataset in np.unique(stretch.items).tolist():
            here = np.flatnonzero(stretch.items == dataset)
            bucket[here], number[here], rounds[here], key[here] = self._run(dataset, int(stretch.numbers[here[0]]), len(here))
        # The short micro-batch of a bucket has its turn at a drawn place, not always at the end.
        missing = buckets.batches[bucket] * buckets.batch_size - buckets.entries[bucket]
        short = (hashed(key, 0) % buckets.batches[bucket].astype(np.uint64)).astype(np.int64)
        size = buckets.batch_size - np.where(number == short, missing, 0)
        first = number * buckets.batch_size - np.where(number > short, missing, 0)
        ends = np.cumsum(size)
        place = np.arange(int(ends[-1])) + np.repeat(first - (ends - size), size)
        bucket = np.repeat(bucket, size)
        entry = shuffled(place, buckets.entries[bucket], np.repeat(hashed(key, 1), size))
        repeat, row = np.divmod(entry, buckets.counts[bucket])
        repeat += np.repeat(rounds, size) * (buckets.entries[bucket] // buckets.counts[bucket])
        samples = buckets.rows[buckets.starts[bucket] + row].astype(np.int64)
        return _Part(self.number, stretch.start, size.tolist(), (ends - size).tolist(), samples, repeat)

    def _run(self, dataset: int, first: int, count: int) -> tuple[Indices, Indices, Indices, Words]:
        """`count` micro-batches of a data set from its `first` in this epoch on: bucket, number in it, pass, and a key for pass and bucket.

        A data set that counts goes through one pass an epoch, one that fills goes on where the epoch before left it; passes are numbered
        from the one that the epoch begins in.
        """
        own = int(self.buckets.own[dataset])
        begins = self.number * int(self.buckets.mix.counts[dataset])
        at = begins + first
        found: list[tuple[Indices, Indices, Indices, Words]] = []
        missing = count
        while missing:
            through, position = divmod(at + count - missing, own)
            spread, keys = self._pass(dataset, through)
            stretch = spread.stretch(position)
            run = slice(position - stretch.start, position - stretch.start + missing)
            items = stretch.items[run]
            rounds = np.full(len(items), through - begins // own)
            found.append((items + self.buckets.first[dataset], stretch.numbers[run], rounds, keys[items]))
            missing -= len(items)
        bucket, number, rounds, key = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return bucket, number, rounds, key

    def _begun(self, dataset: int, through: int) -> tuple[Spread, Words]:
        """One pass over a data set, and a key for each of its buckets."""
        of_dataset = slice(self.buckets.first[dataset], self.buckets.first[dataset + 1])
        spread = Spread(self.buckets.batches[of_dataset], seed_of("order/buckets", self.seed, dataset, through))
        key = key_words(seed_of("order/samples", self.seed, dataset, through))
        return spread, hashed(key, self.buckets.shape[of_dataset])


def _weight(share: Share) -> float:
    return 1.0 if share.probability is None else share.probability


def _micro_batch(part: _Part, at: int, last_place: int, step_samples: int) -> MicroBatch:
    first, size = part.firsts[at], part.sizes[at]
    places = tuple(range(last_place - size, last_place))
    return MicroBatch(part.epoch, part.samples[first : first + size], part.repeats[first : first + size], places, step_samples)


def _pieces(column: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """A column a stretch at a time: one that is mapped from disk is not read into memory as a whole."""
    for start in range(0, len(column), _ROWS_AT_ONCE):
        yield column[start : start + _ROWS_AT_ONCE]
