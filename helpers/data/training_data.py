"""What training asks of the data once everything is cached: batches by step number, text for validation, a fingerprint."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.data.batches import Batch, BatchMaker, prefetched
from helpers.data.buckets import BucketPlan
from helpers.data.cache import Cache, DamagedRecordError, Locations
from helpers.data.catalogue import Catalogue
from helpers.data.fill import FillOptions, is_finite
from helpers.data.latents import LatentFiller
from helpers.data.order import FROM_THE_BEGINNING, EpochOrder, MicroBatch, OrderStart
from helpers.data.reading_ahead import made_in_threads
from helpers.data.sample import Geometry, Sample, Size
from helpers.data.texts import TextFiller, text_key
from helpers.errors import DataError
from helpers.storage.backend import SourceBackend

if TYPE_CHECKING:
    from helpers.protocols import ModelFamily, TextTensors

STEPS_AHEAD = 2  # made before they are asked for
MICRO_BATCHES_AT_ONCE = 16  # read from a network at the same time, so many more are in memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedDataset:
    """One data set, everything of it cached."""

    source: SourceBackend
    latents: Cache
    texts: Cache
    loss_weight: float


@dataclass(frozen=True)
class Recall:
    """Reads what was encoded. What turns out damaged is encoded again, once, with the encoder loaded for just that."""

    family: ModelFamily
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

    def latents(self, dataset: PreparedDataset, location: np.void) -> dict[str, Tensor]:
        """The latents at a place in the data set's cache. DamagedRecordError when they are not what was written."""
        return _finite(dataset.latents.read(location), dataset.latents)

    def encode_again(self, plan: BucketPlan, row: int, dataset: PreparedDataset, catalogue: Catalogue) -> np.void:
        """Encode an image of the plan anew. => the new place of its latents, field "shard" 0 where that failed."""
        with self.family.image_codec(self.device) as codec:
            filler = LatentFiller(plan, int(plan.columns["dataset"][row]), dataset.source, catalogue, dataset.latents, codec)
            return filler.encode_again(row, self.image_options)


class CachedRecords:
    """The rows that can be trained on, read from the caches.

    Row i of the training is row `rows[i]` of the plan. `locations` tells for each row of the plan where its latents lie in the cache
    of its data set.
    """

    def __init__(
        self,
        plan: BucketPlan,
        rows: NDArray[np.int64],
        locations: Locations,
        datasets: Sequence[PreparedDataset],
        catalogue: Catalogue,
        recall: Recall,
        unconditional: Mapping[str, Tensor],
    ) -> None:
        self.plan = plan
        self.rows = rows
        self.locations = locations
        self.datasets = datasets
        self.catalogue = catalogue
        self.recall = recall
        self.unconditional = unconditional
        self._repairing = threading.Lock()

    @property
    def are_remote(self) -> bool:
        """Whether any of the caches is read from a network."""
        return any(dataset.latents.remote or dataset.texts.remote for dataset in self.datasets)

    def sample(self, row: int) -> Sample:
        return self.catalogue.sample(self._column("row", row))

    def geometry(self, row: int) -> Geometry:
        return self.plan.geometry(int(self.rows[row]))

    def loss_weight(self, row: int) -> float:
        return self._dataset(row).loss_weight

    def latents(self, row: int) -> dict[str, Tensor]:
        dataset, planned = self._dataset(row), int(self.rows[row])
        try:
            return self.recall.latents(dataset, self.locations[planned])
        except DamagedRecordError as error:
            sample = self.sample(row)
            log.warning("%s, that of %s/%s; it is encoded again.", error, sample.dataset, sample.key)
        with self._repairing:
            self.locations[planned] = self.recall.encode_again(self.plan, planned, dataset, self.catalogue)
        if not self.locations[planned]["shard"]:
            raise DataError(
                f"The cached latents of {sample.dataset}/{sample.key} are damaged and its file no longer holds the same image; start again."
            )
        return self.recall.latents(dataset, self.locations[planned])

    def text(self, row: int, caption: str | None) -> Mapping[str, Tensor]:
        if caption is None:
            return self.unconditional
        name = self.plan.datasets[self._column("dataset", row)]
        return self.recall.text(self._dataset(row).texts, caption, lambda: list(self.catalogue.captions(name)))

    def _dataset(self, row: int) -> PreparedDataset:
        return self.datasets[self._column("dataset", row)]

    def _column(self, name: str, row: int) -> int:
        return int(self.plan.columns[name][self.rows[row]])


class TrainingData:
    """Everything training asks of the data. Steps and epochs are counted from 0."""

    def __init__(
        self,
        records: CachedRecords,
        order: EpochOrder,
        maker: BatchMaker,
        accumulation: int,
        rank: int,
        world_size: int,
        fingerprint: Mapping[str, str],
        extra_texts: Cache,
        extra_captions: Sequence[str],
    ) -> None:
        self._records = records
        self._order = order
        self._maker = maker
        self._accumulation = accumulation
        self._rank = rank
        self._world_size = world_size
        self._fingerprint = dict(fingerprint)
        self._extra_texts = extra_texts
        self._extra_captions = extra_captions

    @property
    def micro_batches_per_epoch(self) -> int:
        return self._order.micro_batches_per_epoch

    @property
    def samples_per_epoch(self) -> int:
        return self._order.samples_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """Not always whole: a step may begin in one epoch and end in the next."""
        return self.micro_batches_per_epoch / (self._accumulation * self._world_size)

    def untouched_epoch(self, steps: int, order: OrderStart = FROM_THE_BEGINNING) -> int:
        """The first epoch of which nothing was trained in the first `steps` steps."""
        return self._order.untouched_epoch(steps, self._accumulation * self._world_size, order)

    def steps(self, start: int, end: int, order: OrderStart = FROM_THE_BEGINNING) -> Iterator[list[Batch]]:
        """For each step from `start` up to but without `end`, this process's batches, one for each round of accumulation.

        `order` tells where the order of this data begins, not after `start`. The batches are made ahead in a thread, which ends when
        the iterator is closed or used up.
        """

        def micro_batches() -> Iterator[tuple[MicroBatch, int]]:
            for step in range(start, end):
                for micro_batch in self._order.step(step, self._rank, self._world_size, self._accumulation, order):
                    yield micro_batch, step

        def make(of_step: tuple[MicroBatch, int]) -> Batch:
            return self._maker.make(*of_step)

        def produce() -> Iterator[list[Batch]]:
            # Reading from a network is mostly waiting, for many at once; from a disk one thread is enough, and leaves the cores to others.
            pairs = micro_batches()
            batches = made_in_threads(make, pairs, MICRO_BATCHES_AT_ONCE) if self._records.are_remote else map(make, pairs)
            for _ in range(start, end):
                yield [next(batches) for _ in range(self._accumulation)]

        return prefetched(produce, STEPS_AHEAD)

    def fingerprint(self) -> dict[str, str]:
        """What must be the same for a run to go on as it would have: values by name, to be kept in checkpoints and compared."""
        return dict(self._fingerprint)

    def text(self, caption: str) -> TextTensors:
        """The text encoders' answer for "" or one of the extra captions, without a batch dimension, in the cache's precision."""
        return self._records.recall.text(self._extra_texts, caption, lambda: self._extra_captions)

    @property
    def unconditional(self) -> TextTensors:
        """What a dropped caption becomes."""
        return dict(self._records.unconditional)

    @property
    def most_common_shape(self) -> Size:
        """The size that most samples are trained at; of equally common ones the first."""
        shapes = self._records.plan.columns["shape"][self._records.rows]
        return self._records.plan.shapes[int(np.bincount(shapes).argmax())]

    def describe(self) -> str:
        """One line: samples, shapes, micro-batches of an epoch."""
        shapes = len(np.unique(self._records.plan.columns["shape"][self._records.rows]))
        return (
            f"{self.samples_per_epoch:,} samples an epoch in {shapes:,} shape{'s' if shapes != 1 else ''}"
            f" · {self.micro_batches_per_epoch:,} micro-batches · {self.steps_per_epoch:,.1f} steps"
        )


def _finite(record: dict[str, Tensor], cache: Cache) -> dict[str, Tensor]:
    if not is_finite(record):
        raise DamagedRecordError(f"{cache.folder}: a record holds values that are not finite")
    return record
