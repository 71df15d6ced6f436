"""Where the latents of a run are: which are cached, and at which place of which cache.

The crops of most datasets never change, so their latents serve every epoch. Datasets whose crops are redrawn have other latents in each
epoch, in a cache folder of its own that is removed when the epoch is over.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from helpers.config.datasets import DatasetConfig
from helpers.data.cache.cache import Cache, DamagedRecordError
from helpers.data.cache.index import LOCATION, Locations
from helpers.data.encode.codec import SharedCodec
from helpers.data.encode.common import is_finite
from helpers.data.encode.keys import Rows, crops, latents_facts, latents_key
from helpers.data.plan.buckets import BucketPlan
from helpers.data.planned import PlannedData
from helpers.data.settings import DataContext, DataSettings
from helpers.data.sources import CachePlace, epoch_prefix, latents_place, open_caches
from helpers.storage.memo import digest_of

EVERY_EPOCH = -1  # stands for the number of an epoch where latents serve all epochs


class Unit(NamedTuple):
    """Images that are encoded as one batch: rows of a plan, of one dataset and one shape."""

    latents: EpochLatents
    dataset: int  # index in the plan
    rows: Rows

    @property
    def cache(self) -> Cache:
        return self.latents.caches[self.dataset]


class EpochLatents:
    """The latents of one epoch, or, with the number EVERY_EPOCH, those that serve all epochs.

    `caches` holds the cache of each dataset that has latents here, by its index in the plan. `locations` (N,) has the place of each row of
    the plan; field "shard" is 0 where nothing is cached as far as is known. `failed` (N,) marks rows that could not be encoded.
    """

    def __init__(
        self, number: int, data: PlannedData, plan: BucketPlan, caches: Mapping[int, Cache], codec: SharedCodec, settings: DataSettings
    ) -> None:
        self.number = number
        self.data = data
        self.plan = plan
        self.caches = caches
        self.rows = {dataset: np.flatnonzero(plan.columns["dataset"] == dataset) for dataset in caches}
        self.locations: Locations = np.zeros(len(plan), dtype=LOCATION)
        self.failed = np.zeros(len(plan), dtype=bool)
        self._codec = codec
        self._settings = settings

    # -- what is cached ---------------------------------------------------------------------------------------------------

    def facts(self, dataset: int, content: str, crop: str) -> dict[str, str]:
        """All that the record of an image depends on; see `latents_facts`."""
        return latents_facts(content, crop, self._codec.fingerprint, self._settings.cache_dtype, self.data.companions[dataset])

    def locate(self) -> None:
        """Look up all rows."""
        failed = list(self.data.catalogue.failed(self.number))
        for dataset, rows in self.rows.items():
            contents = self.data.catalogue.contents(self.data.datasets[dataset].id)
            keys = (self._key(dataset, content, crop) for content, crop in zip(contents, crops(self.plan, rows), strict=True))
            self.locations[rows] = self.caches[dataset].find(keys)
            self.failed[rows] = np.isin(self.plan.columns["row"][rows], failed) & ~self.are_cached(rows)

    def locate_row(self, row: int) -> bool:
        """Look up one row. Returns whether it is cached."""
        dataset = self.data.dataset_of(row)
        location = self.caches[dataset].find([self.key(row)])[0]
        if location["shard"]:
            self.locations[row] = location
        return bool(location["shard"])

    def key(self, row: int) -> bytes:
        """The key of a row's record; b"", which no record has, where nobody has read the image yet."""
        content = self.data.catalogue.content(int(self.plan.columns["row"][row]))
        return self._key(self.data.dataset_of(row), content, crops(self.plan, [row])[0])

    def _key(self, dataset: int, content: str | None, crop: str) -> bytes:
        return b"" if content is None else latents_key(self.facts(dataset, content, crop))

    def read(self, row: int) -> dict[str, Tensor]:
        """The record of a row that is located. Raises DamagedRecordError where it is not what was written."""
        cache = self.caches[self.data.dataset_of(row)]
        record = cache.read(self.locations[row])
        if not is_finite(record):
            raise DamagedRecordError(f"{cache.folder}: a record holds values that are not finite")
        return record

    def has(self, row: int) -> bool:
        """Whether a row is cached, as far as is known."""
        return bool(self.locations["shard"][row])

    def are_cached(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of some rows are."""
        return self.locations["shard"][rows] != 0

    @property
    def cached(self) -> int:
        """The number of rows that are."""
        return sum(int(self.are_cached(rows).sum()) for rows in self.rows.values())

    def lacks(self, rows: Rows) -> bool:
        """Whether some of these rows are still to be encoded, as far as is known."""
        return not (self.are_cached(rows) | self.failed[rows]).all()

    @property
    def is_incomplete(self) -> bool:
        return any(self.lacks(rows) for rows in self.rows.values())

    def twins(self, row: int) -> list[int]:
        """The rows that share a row's record: the same image under other names, with the same crop. Includes the row itself."""
        images = list(self.data.catalogue.with_content_of(int(self.plan.columns["row"][row])))
        rows = self.rows[self.data.dataset_of(row)]
        rows = rows[np.isin(self.plan.columns["row"][rows], images)]
        (crop,) = crops(self.plan, [row])
        return [int(other) for other, other_crop in zip(rows, crops(self.plan, rows), strict=True) if other_crop == crop]

    # -- units: made when the first is asked for, since nobody asks where everything is cached, and there may be many ------------

    @cached_property
    def units(self) -> list[Unit]:
        """All units in the order of the plan."""
        size = self._settings.vae_batch_size
        units = []
        for dataset, rows in self.rows.items():
            shapes = self.plan.columns["shape"][rows]
            for of_shape in (rows[shapes == shape] for shape in np.unique(shapes)):
                units += [Unit(self, dataset, of_shape[start : start + size]) for start in range(0, len(of_shape), size)]
        return units

    @cached_property
    def unit_of(self) -> NDArray[np.int32]:
        """(N,) the index in `units` of each row's unit; -1 for rows without latents here."""
        numbers = np.full(len(self.plan), -1, np.int32)
        for number, unit in enumerate(self.units):
            numbers[unit.rows] = number
        return numbers


class LatentStore:
    """The latents of all epochs. Safe to use from several threads. Opens no cache before it is asked for its latents."""

    def __init__(self, data: PlannedData, codec: SharedCodec, context: DataContext) -> None:
        self.data = data
        self.redrawn = [dataset.vae_cache_clear_each_epoch for dataset in data.datasets]
        self.is_remote = False  # whether latents are read from a network
        self._codec = codec
        self._context = context
        self._settings = context.settings
        self._memo = context.memo
        self._lock = threading.RLock()
        self._epochs: dict[int, EpochLatents] = {}

    def holder(self, row: int, epoch: int) -> EpochLatents:
        """The latents that hold a row of the plan in an epoch."""
        return self.at(self.number(row, epoch))

    def number(self, row: int, epoch: int) -> int:
        """Their number: `epoch`, or EVERY_EPOCH."""
        return epoch if self.redrawn[self.data.dataset_of(row)] else EVERY_EPOCH

    def at(self, number: int) -> EpochLatents:
        """Those with a number, located."""
        found = self._epochs.get(number)
        if found is not None:
            return found
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = self._open(number)
            return self._epochs[number]

    def present(self, epoch: int) -> list[EpochLatents]:
        """All latents that an epoch needs."""
        return [self.at(number) for number in sorted({epoch if redrawn else EVERY_EPOCH for redrawn in self.redrawn})]

    def close_before(self, epoch: int, walked: int) -> None:
        """Give up those of earlier epochs, which this process trains no more: writers drop what they have not sealed.

        `walked` is the epoch that the encoder is in: of those up to there nothing is encoded any more, but it still counts their units.
        """
        with self._lock:
            for number in [number for number in self._epochs if EVERY_EPOCH < number < epoch]:
                for cache in self._epochs[number].caches.values():
                    cache.give_up()
                if number < walked:
                    for cache in self._epochs.pop(number).caches.values():
                        cache.close()

    def remove_before(self, epoch: int) -> None:
        """Remove the cache folders of this run's earlier epochs. Only the first process does anything."""
        if not self._context.workers.is_first:
            return
        redrawn = [dataset for dataset in self.data.datasets if dataset.vae_cache_clear_each_epoch]
        for folder in {latents_place(dataset, self._settings.cache_dir).folder for dataset in redrawn}:
            for found in folder.glob(f"{self._prefix}*"):
                if int(found.name.removeprefix(self._prefix)) < epoch:
                    shutil.rmtree(found, ignore_errors=True)  # what cannot be removed costs space, and stops no run

    def remember(self) -> None:
        """Store the places of the latents that serve every epoch, so that the next start need not look them up.

        Does nothing while some are missing, and in other processes than the first.
        """
        latents = self._epochs.get(EVERY_EPOCH)
        if latents is None or not self._context.workers.is_first or latents.is_incomplete or latents.failed.any():
            return
        inputs = self._inputs(latents)
        if self._memo.load_bytes("locations", inputs) is None:
            self._memo.save_bytes("locations", inputs, latents.locations.tobytes())

    def _open(self, number: int) -> EpochLatents:
        plan = self.data.plan if number == EVERY_EPOCH else self.data.plan_of(number)
        indices = [index for index, redrawn in enumerate(self.redrawn) if redrawn == (number != EVERY_EPOCH)]
        places = [self._place(self.data.datasets[index], number) for index in indices]
        caches = open_caches(places, self._context.report)
        self.is_remote = self.is_remote or any(cache.remote for cache in caches)
        latents = EpochLatents(number, self.data, plan, dict(zip(indices, caches, strict=True)), self._codec, self._settings)
        known = self._memo.load_bytes("locations", self._inputs(latents)) if number == EVERY_EPOCH else None
        if known is None:
            latents.locate()
        else:
            latents.locations = np.frombuffer(known, LOCATION).copy()
        return latents

    def _inputs(self, latents: EpochLatents) -> str:
        """Everything that the places of latents depend on."""
        marks = [cache.revision() for cache in latents.caches.values()]
        return digest_of(self.data.digest(), self._codec.fingerprint, marks, self._settings.cache_dtype, LOCATION.descr)

    def _place(self, dataset: DatasetConfig, number: int) -> CachePlace:
        """Latents of single epochs are on this machine, wherever those of every epoch are."""
        place = latents_place(dataset, self._settings.cache_dir)
        return place if number == EVERY_EPOCH else CachePlace(place.folder / f"{self._prefix}{number}")

    @property
    def _prefix(self) -> str:
        return epoch_prefix(self._settings.output_dir, self._settings.seed)
