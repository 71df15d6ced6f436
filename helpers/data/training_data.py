"""What training asks of the data: batches by step number, text for validation, a fingerprint."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from helpers.data.base.prefetch import made_in_threads
from helpers.data.base.sample import Geometry, Sample, Size
from helpers.data.batches import Batch, BatchMaker, CaptionDraw, prefetched
from helpers.data.cache.cache import Cache, DamagedRecordError
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.encode.background import BackgroundEncoder
from helpers.data.encode.conditions import NAME as CONDITION
from helpers.data.encode.fill import FillOptions, is_finite
from helpers.data.encode.passes import Pass, Passes
from helpers.data.encode.texts import TextFiller, text_key
from helpers.data.order.epoch_order import FROM_THE_BEGINNING, EpochOrder, MicroBatch, OrderStart
from helpers.data.ports import can_drop_encoders_apart
from helpers.errors import DataError

if TYPE_CHECKING:
    from helpers.data.ports import ModelEncoders, TextTensors

STEPS_AHEAD = 2  # made before they are asked for
MICRO_BATCHES_AT_ONCE = 16  # read from a network at the same time, so many more are in memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedDataset:
    """What the records of a data set have in common."""

    texts: Cache | None  # None where captions are encoded in every step
    loss_weight: float
    regularises: bool = False  # it is not what the run is for


@dataclass(frozen=True)
class Recall:
    """Reads what was encoded. What turns out damaged is encoded again, once, with the encoder loaded for just that."""

    family: ModelEncoders
    device: torch.device
    text_fingerprint: str
    image_options: FillOptions
    text_options: FillOptions
    repairing: threading.Lock = field(default_factory=threading.Lock)  # one load of the text encoders at a time

    def text(self, cache: Cache, caption: str | None, siblings: Callable[[], Sequence[str]]) -> dict[str, Tensor]:
        """The text tensors of a caption, None being the unconditional; `siblings` are the captions it was encoded in order with."""
        key = text_key(caption, self.text_fingerprint, self.text_options.cache_dtype)
        try:
            record = cache.get(key)
            if record is not None:
                return _finite(record, cache)
        except DamagedRecordError as error:
            log.warning("%s, that of the caption %r; it is encoded again.", error, (caption or "")[:80])
            cache.discard(key)
        with self.repairing, self.family.text_encoders(self.device) as encoders:
            filler = TextFiller(cache, encoders)
            if caption is None:
                filler.keep(None, self.family.unconditional(encoders), self.text_options)
            else:
                batches = filler.batches(siblings(), self.text_options.batch_size)
                filler.encode([batch for batch in batches if caption in batch], self.text_options)
        record = cache.get(key)
        if record is None:
            raise DataError(
                f"The text tensors of the caption {(caption or '')[:80]!r} are not in {cache.folder}; start again to encode them."
            )
        return record

    def latents_again(self, damaged: Pass, row: int) -> dict[str, Tensor] | None:
        """Encode an image of the plan anew. => its latents; None where the file no longer holds the same image."""
        filler = damaged.fillers[int(damaged.plan.columns["dataset"][row])]
        with self.family.image_codec(self.device) as codec:
            location = filler.with_codec(codec).encode_again(row, self.image_options)
        if not location["shard"]:
            return None
        damaged.locations[row] = location
        return _finite(filler.cache.read(location), filler.cache)


@dataclass(frozen=True)
class Steps:
    """Which micro-batches a step is made of, for this process and for all. Steps and epochs are counted from 0."""

    order: EpochOrder
    accumulation: int
    rank: int = 0
    world_size: int = 1

    @property
    def micro_batches(self) -> int:
        """Of one step, over all processes."""
        return self.accumulation * self.world_size

    def here(self, step: int, start: OrderStart) -> list[MicroBatch]:
        """Those of this process."""
        return self.order.step(step, self.rank, self.world_size, self.accumulation, start)

    def all(self, first: int, start: OrderStart, end: int | None = None) -> Iterator[MicroBatch]:
        """Those of all processes from step `first` on, in the order of training."""
        for step in itertools.count(first) if end is None else range(first, end):
            yield from self.order.step(step, accumulation=self.micro_batches, start=start)

    def epoch(self, step: int, start: OrderStart) -> int:
        """The epoch that a step begins in."""
        return next(self.all(step, start)).epoch


class CachedRecords:
    """The rows of the plan, read from the caches.

    `from_the_start` gives the micro-batches of all processes from the beginning of the order. `ahead` has the latents that are encoded
    while training runs.
    """

    def __init__(
        self,
        passes: Passes,
        datasets: Sequence[PreparedDataset],
        catalogue: Catalogue,
        recall: Recall,
        unconditional: Mapping[str, Tensor],
        from_the_start: Callable[[], Iterator[MicroBatch]],
        ahead: BackgroundEncoder | None = None,
        are_remote: bool = False,
    ) -> None:
        self.from_the_start = from_the_start
        self.passes = passes
        self.plan = passes.plan
        self.datasets = datasets
        self.catalogue = catalogue
        self.recall = recall
        self.unconditional = unconditional
        self.ahead = ahead
        self.are_remote = are_remote  # whether any of the caches is read from a network
        self._repairing = threading.Lock()

    def sample(self, row: int) -> Sample:
        return self.catalogue.sample(self._column("row", row))

    def geometry(self, row: int, epoch: int) -> Geometry:
        return self.passes.of(row, epoch).plan.geometry(row)

    def loss_weight(self, row: int) -> float:
        return self._dataset(row).loss_weight

    def latents(self, row: int, epoch: int) -> dict[str, Tensor] | None:
        wanted = self.passes.of(row, epoch)
        try:
            return self._latents(wanted, row, epoch)
        except DamagedRecordError as error:
            sample = self.sample(row)
            log.warning("%s, that of %s/%s; it is encoded again.", error, sample.dataset, sample.key)
        with self._repairing:
            latents = self.recall.latents_again(wanted, self._first_of_twins(wanted, row))
        if latents is None:
            raise DataError(
                f"The cached latents of {sample.dataset}/{sample.key} are damaged and its file no longer holds the same image; start again."
            )
        return latents

    def _first_of_twins(self, wanted: Pass, row: int) -> int:
        """Of the rows that share the record of a row, the one of the unit that training needs first: as that one it was encoded."""
        twins = wanted.fillers[self._column("dataset", row)].twins(row)
        if len(twins) == 1:
            return row
        by_unit = {wanted.unit_of(twin): twin for twin in reversed(twins)}
        needed = (wanted.unit_of(row) for micro in self.from_the_start() if micro.epoch >= wanted.number for row in micro.samples)
        return next(by_unit[unit] for unit in needed if unit in by_unit)

    def _latents(self, wanted: Pass, row: int, epoch: int) -> dict[str, Tensor] | None:
        cache = wanted.fillers[self._column("dataset", row)].cache
        if self.ahead is not None:
            self.ahead.reached(epoch)
        location = wanted.locations[row]
        if location["shard"]:
            return _finite(cache.read(location), cache)
        if self.ahead is None or wanted.hopeless[row]:
            return None
        latents = self.ahead.wait_for(wanted, row)
        return None if latents is None else _finite(latents, cache)

    def blank_latents(self, row: int, epoch: int) -> dict[str, Tensor]:
        spec = self.recall.family.latents
        target = self.geometry(row, epoch).target
        blank = torch.zeros(spec.channels, target.height // spec.downsampling, target.width // spec.downsampling)
        conditions = self.passes.of(row, epoch).fillers[self._column("dataset", row)].conditions
        if conditions is None:
            return {"mean": blank}
        return {"mean": blank, CONDITION: blank if conditions.as_latents else torch.zeros(3, target.height, target.width)}

    def text(self, row: int, told: CaptionDraw) -> Mapping[str, Tensor]:
        if told.caption is None:
            return self.unconditional
        texts = self._dataset(row).texts
        if texts is None:
            return {}
        name = self.plan.datasets[self._column("dataset", row)]
        text = self.recall.text(texts, told.caption, lambda: list(self.catalogue.captions(name)))
        if not told.without:
            return text
        family = self.recall.family
        assert can_drop_encoders_apart(family), "only such a family names encoders to drop"
        return family.without(text, told.without)

    def _dataset(self, row: int) -> PreparedDataset:
        return self.datasets[self._column("dataset", row)]

    def _column(self, name: str, row: int) -> int:
        return int(self.plan.columns[name][row])


class TrainingData:
    """Everything training asks of the data. Steps and epochs are counted from 0.

    `undecodable` are, by data set, the images that were left out as such when the run began: to be kept in checkpoints, so that the
    plan of the run stays what it is.
    """

    def __init__(
        self,
        records: CachedRecords,
        steps: Steps,
        maker: BatchMaker,
        fingerprint: Callable[[Mapping[str, str] | None], dict[str, str]],
        undecodable: Mapping[str, Sequence[str]],
        tell_of_failures: Callable[[], None],
        remove_passes: Callable[[int], None],
        needed: Callable[[], Steps],
        extra_texts: Cache | None,
        extra_captions: Sequence[str],
    ) -> None:
        self.undecodable = undecodable
        self._records = records
        self._steps = steps
        self._maker = maker
        self._fingerprint = fingerprint
        self._tell_of_failures = tell_of_failures
        self._remove_passes = remove_passes
        self._needed = needed  # steps for another thread: an order is not to be shared between threads
        self._extra_texts = extra_texts
        self._extra_captions = extra_captions

    @property
    def micro_batches_per_epoch(self) -> int:
        """Of the first epoch; see `EpochOrder`."""
        return self._steps.order.micro_batches_per_epoch

    def micro_batches(self, first_epoch: int, end_epoch: int) -> int:
        """Of the epochs from `first_epoch` up to but without `end_epoch`, over all processes."""
        return self._steps.order.micro_batches(first_epoch, end_epoch)

    @property
    def samples_per_epoch(self) -> int:
        """With those that turn out not to be encodable."""
        return self._steps.order.samples_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """Not always whole: a step may begin in one epoch and end in the next."""
        return self.micro_batches_per_epoch / self._steps.micro_batches

    def untouched_epoch(self, steps: int, order: OrderStart = FROM_THE_BEGINNING) -> int:
        """The first epoch of which nothing was trained in the first `steps` steps."""
        return self._steps.order.untouched_epoch(steps, self._steps.micro_batches, order)

    def steps(
        self, start: int, end: int, order: OrderStart = FROM_THE_BEGINNING, keep_captions: bool = False
    ) -> Generator[list[Batch], None, None]:
        """For each step from `start` up to but without `end`, this process's batches, one for each round of accumulation.

        `keep_captions` is for those who look at the data and do not train on it: no caption is dropped.
        `order` tells where the order of this data begins, not after `start`. The batches are made ahead in a thread, and latents
        that are missing are encoded in another; both end when the iterator is closed or used up.
        """
        ahead = self._records.ahead
        maker = self._maker.keeping_captions() if keep_captions else self._maker

        def micro_batches() -> Iterator[tuple[MicroBatch, int]]:
            for step in range(start, end):
                for micro_batch in self._steps.here(step, order):
                    yield micro_batch, step

        def make(of_step: tuple[MicroBatch, int]) -> Batch:
            return maker.make(*of_step)

        def produce() -> Iterator[list[Batch]]:
            # Reading from a network is mostly waiting, for many at once; from a disk one thread is enough, and leaves the cores to others.
            pairs = micro_batches()
            batches = made_in_threads(make, pairs, MICRO_BATCHES_AT_ONCE) if self._records.are_remote else map(make, pairs)
            for _ in range(start, end):
                yield [next(batches) for _ in range(self._steps.accumulation)]

        if ahead is not None:
            ahead.start(lambda: self._needed().all(start, order, end))
        batches = prefetched(produce, STEPS_AHEAD)
        try:
            yield from self._followed(batches)
        finally:
            self.close()  # first: the thread that makes batches may wait for latents
            batches.close()

    def _followed(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Steps as they come; passes of single epochs that are over are forgotten, and a step later removed.

        Asking for a step says that this process is through with the one before, and so that every process has asked for that one.
        """
        ahead = self._records.ahead
        epochs: deque[int] = deque(maxlen=2)  # that this process's last two steps began in
        told = False
        for step in batches:
            if ahead is not None:
                ahead.check()
                if ahead.finished and not told:
                    self._tell_of_failures()
                    told = True
            if len(epochs) == 2:
                self._remove_passes(epochs[0])
            if epochs:
                self._records.passes.forget(epochs[-1])
            epochs.append(step[0].epoch)
            yield step

    def close(self) -> None:
        """Stop encoding behind training; what has been encoded is kept."""
        if self._records.ahead is not None:
            self._records.ahead.close()
        self._tell_of_failures()

    def fingerprint(self, like: Mapping[str, str] | None = None) -> dict[str, str]:
        """What must be the same for a run to go on as it would have: values by name, to be kept in checkpoints.

        With `like`, the fingerprint in a checkpoint, the one to compare it with.
        """
        return self._fingerprint(like)

    def remember_undecodable(self) -> None:
        """Have later runs leave out from the beginning what this one could not decode.

        To be called once a checkpoint holds this run's plan: if it is killed before, its next start must still find the same one.
        """
        self._records.catalogue.leave_out_undecodable()

    def text(self, caption: str) -> TextTensors:
        """The text encoders' answer for "" or one of the extra captions, without a batch dimension, in the cache's precision."""
        if self._extra_texts is None:
            raise ValueError("The text encoders are trained: no caption is cached.")
        return self._records.recall.text(self._extra_texts, caption, lambda: self._extra_captions)

    @property
    def unconditional(self) -> TextTensors:
        """What a dropped caption becomes."""
        return dict(self._records.unconditional)

    @property
    def samples_of_datasets(self) -> dict[str, int]:
        """How many samples of each data set are trained, by its id."""
        plan = self._records.plan
        counts = np.bincount(plan.columns["dataset"], minlength=len(plan.datasets))
        return dict(zip(plan.datasets, counts.tolist(), strict=True))

    @property
    def most_common_shape(self) -> Size:
        """The size that most samples are trained at, those of regularisation sets aside; of equally common ones the first."""
        columns = self._records.plan.columns
        learnt = np.array([not dataset.regularises for dataset in self._records.datasets])[columns["dataset"]]
        return self._records.plan.shapes[int(np.bincount(columns["shape"][learnt]).argmax())]

    def describe(self) -> str:
        """One line: samples, shapes, micro-batches of an epoch."""
        shapes = len(self._records.plan.shapes)
        return (
            f"{self.samples_per_epoch:,} samples an epoch in {shapes:,} shape{'s' if shapes != 1 else ''}"
            f" · {self.micro_batches_per_epoch:,} micro-batches · {self.steps_per_epoch:,.1f} steps"
        )


def _finite(record: dict[str, Tensor], cache: Cache) -> dict[str, Tensor]:
    if not is_finite(record):
        raise DamagedRecordError(f"{cache.folder}: a record holds values that are not finite")
    return record
