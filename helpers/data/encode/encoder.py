"""Encoding a run's images: all of them before training, or each a little before training needs it.

Both ways take units from the same walk (`Walk`) and encode them in the same pipeline (`encode_units`). What another process encodes
appears in the shared cache, and what it could not encode appears in the catalogue.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from torch import Tensor

from helpers.data.base.progress import bar
from helpers.data.base.workers import Workers
from helpers.data.cache.cache import DamagedRecordError
from helpers.data.encode.codec import SharedCodec
from helpers.data.encode.common import EncodeOptions, EncodeTotals, totals_of_all
from helpers.data.encode.pipeline import RecordWriter, encode_units
from helpers.data.encode.store import EVERY_EPOCH, EpochLatents, LatentStore, Unit
from helpers.data.encode.walk import Walk
from helpers.data.order.epoch_order import MicroBatch, OrderStart
from helpers.data.order.steps import Steps
from helpers.data.planned import PlannedData
from helpers.data.settings import DataContext
from helpers.errors import DataError, Interrupted, quoted

POLL_SECONDS = 0.05  # between two looks for what another process encodes
SHARE_SECONDS = 2.0  # until what has been encoded is visible to other processes

log = logging.getLogger(__name__)


class LatentEncoder:
    """Encodes a run's images and reads their latents.

    First `drain`, which encodes everything now, or `locate`, which only looks up what is cached; then `prepare_thread`. While training
    runs, between `start` and `close`, a thread encodes what is left, latents of single epochs up to the epoch after the one that training
    is in. `read` may be called from any thread.
    """

    def __init__(self, data: PlannedData, steps: Steps, context: DataContext) -> None:
        self.codec = SharedCodec(context.family, context.settings.device)
        self.store = LatentStore(data, self.codec, context)
        self.has_finished = False  # the thread has encoded everything
        self._data = data
        self._steps = steps
        self._settings = context.settings
        self._workers = context.workers
        self._report = context.report
        self._options = context.encode_options(context.settings.vae_batch_size)
        self._present: list[EpochLatents] = []  # what the epoch needs that training begins in
        self._repairing = threading.Lock()
        self._needs_thread = False
        self._held_for_thread = ExitStack()  # the codec, loaded
        self._thread: threading.Thread | None = None
        # Shared with the thread:
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._walk = Walk(self.store, self._workers)
        self._writer = RecordWriter(data.catalogue, self._options)
        self._reached = 0  # the epoch that training is in

    # -- before training --------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Encode all that the first epoch needs, which for most datasets is all that any epoch needs.

        Raises DataError where no image of a dataset can be encoded, StorageError, and Interrupted when stopped.
        """
        with self._workers.phase():
            self._look_up()
            units = list(self._units_now()) if self._is_incomplete else []
            mine = self._encode(units, self._options) if units else EncodeTotals()
        totals = totals_of_all([mine], self._workers)
        for latents in self._present:
            if latents.is_incomplete:
                latents.locate()  # all of it: an image whose bytes were known under another name is found once it has been read
        self.store.remember()
        self._report.chapter("latents", totals.describe(len(self._data.plan), "encoding"))
        _require_images(self._present)

    def locate(self) -> None:
        """Look up what is cached; the rest is encoded while training runs."""
        with self._workers.phase():
            self._look_up()
        cached, needed = sum(latents.cached for latents in self._present), len(self._data.plan)
        later = "; the rest is encoded while training runs" if cached < needed else ""
        self._report.chapter("latents", f"{needed:,} needed, {cached:,} cached{later}")

    def prepare_thread(self) -> None:
        """Load the codec if something is left to encode while training runs."""
        self._needs_thread = any(self.store.redrawn) or self._is_incomplete
        if self._needs_thread:
            self._held_for_thread.enter_context(self.codec.held())
            self.codec.load()

    def _look_up(self) -> None:
        epoch = self._steps.epoch(self._settings.step, self._settings.order)
        self.store.remove_before(epoch)
        self._present = self.store.present(epoch)

    @property
    def _is_incomplete(self) -> bool:
        return any(latents.is_incomplete for latents in self._present)

    def _units_now(self) -> Iterator[Unit]:
        """What this process encodes before training, in the order in which it would be encoded while training runs."""
        settings, walk = self._settings, Walk(self.store, self._workers)
        # Of one image under several names the record that is encoded first is kept. So this walk starts where the order starts.
        for micro in self._from_the_start():
            if micro.epoch > settings.order.epoch or walk.is_over:
                break
            yield from walk.needed(micro, only=EVERY_EPOCH)
        if any(self.store.redrawn):
            first = self._steps.epoch(settings.step, settings.order)
            for micro in self._steps.all(settings.step, settings.order):
                if micro.epoch > first:
                    break
                yield from walk.needed(micro)
        for latents in self._present:
            yield from walk.rest(latents)

    def _encode(self, units: Sequence[Unit], options: EncodeOptions) -> EncodeTotals:
        with bar(self._report, "encode images", sum(len(unit.rows) for unit in units), "images") as progress:
            options = dataclasses.replace(options, progress=progress)
            return encode_units(units, self.codec, RecordWriter(self._data.catalogue, options), options)

    def _from_the_start(self) -> Iterator[MicroBatch]:
        """The micro-batches of all processes from the start of the order."""
        return self._steps.copy().all(self._settings.order.step, self._settings.order)

    # -- while training runs ----------------------------------------------------------------------------------------------

    def start(self, step: int, order: OrderStart, end: int) -> None:
        """Start to encode what the steps from `step` up to but without `end` need. Does nothing if nothing is left to encode."""
        if not self._needs_thread:
            return
        self._stopped.clear()
        self.has_finished, self._error, self._reached = False, None, 0
        seal_after = SHARE_SECONDS if self._workers.world_size > 1 else self._options.seal_after
        workers = dataclasses.replace(self._workers, should_stop=self._stopped.is_set)
        options = dataclasses.replace(self._options, workers=workers, seal_after=seal_after)
        self._walk, self._writer = Walk(self.store, workers), RecordWriter(self._data.catalogue, options)
        units = self._units_ahead(self._steps.copy().all(step, order, end))
        self._thread = threading.Thread(target=self._work, args=(units, options), name="latents", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and everybody who waits for it. What has been encoded is sealed. Does nothing before `start`."""
        self._stopped.set()
        with self._writer.wrote:
            self._writer.wrote.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise the error that ended the thread, if there was one."""
        if self._error is not None:
            raise self._error

    def close_before(self, epoch: int) -> None:
        """Give up the latents of earlier epochs: this process no longer trains them."""
        self.store.close_before(epoch, self._walk.epoch)

    def _units_ahead(self, micro_batches: Iterator[MicroBatch]) -> Iterator[Unit | None]:
        """What this process encodes while training runs; None while training has to catch up."""
        for micro in micro_batches:
            while micro.epoch > self._reached + 1:
                yield None
            yield from self._walk.needed(micro)
            if self._walk.is_over:
                return

    def _work(self, units: Iterator[Unit | None], options: EncodeOptions) -> None:
        try:
            encode_units(units, self.codec, self._writer, options)
            _require_images([self.store.at(EVERY_EPOCH)])
        except Interrupted:
            pass  # by `close`
        except BaseException as error:
            self._error = error
        finally:
            self._held_for_thread.close()
            self.has_finished = True
            with self._writer.wrote:
                self._writer.wrote.notify_all()

    # -- reading ----------------------------------------------------------------------------------------------------------

    def read(self, row: int, epoch: int) -> dict[str, Tensor] | None:
        """The record of a row of the plan, as soon as some process has encoded it; None if its image cannot be encoded.

        A damaged record is encoded again. Raises DataError if its image has changed since, and Interrupted after `close`.
        """
        latents = self.store.holder(row, epoch)
        self._reached = max(self._reached, epoch)
        try:
            if latents.has(row):
                return latents.read(row)
            if not self._needs_thread or latents.failed[row]:
                return None
            return self._wait_for(latents, row)
        except DamagedRecordError as error:
            sample = self._data.sample(row)
            log.warning("%s, that of %s/%s; it is encoded again.", error, sample.dataset, quoted(sample.key))
        with self._repairing:
            if not self._repair(latents, row):
                raise DataError(
                    f"The cached latents of {sample.dataset}/{sample.key} are damaged and its file no longer holds the same image;"
                    " start again."
                )
        return latents.read(row)

    def _wait_for(self, latents: EpochLatents, row: int) -> dict[str, Tensor] | None:
        image = int(latents.plan.columns["row"][row])
        while True:
            has_finished = self.has_finished  # before looking: what is not there although it had finished never comes
            record = self._writer.unsealed(latents.number, row)
            if record is not None:
                return record
            if latents.locate_row(row):
                return latents.read(row)
            if self._data.catalogue.has_failed(latents.number, image):
                return None
            self.check()
            if has_finished and self._workers.world_size == 1:
                raise RuntimeError(f"row {row} of epoch {latents.number} was never encoded")
            if self._stopped.is_set():
                raise Interrupted("stopped while training waited for latents; encoded images are kept, start again to continue")
            with self._writer.wrote:
                self._writer.wrote.wait(POLL_SECONDS)

    def _repair(self, latents: EpochLatents, row: int) -> bool:
        """Encode the record of a row again. Returns False if its image is not the one it was."""
        twins = latents.twins(row)
        first = row if len(twins) == 1 else self._first_needed(latents, twins)
        cache, key = latents.caches[self._data.dataset_of(row)], latents.key(row)
        cache.discard(key)
        options = dataclasses.replace(self._options, workers=Workers(self._workers.rank, self._workers.world_size))  # which nobody stops
        writer = RecordWriter(self._data.catalogue, options)
        encode_units([latents.units[latents.unit_of[first]]], self.codec, writer, options)
        (location,) = cache.find([key])
        if location["shard"]:
            latents.locations[twins] = location
        return bool(location["shard"])

    def _first_needed(self, latents: EpochLatents, twins: list[int]) -> int:
        """Of rows that share a record, the one in the unit that training needs first: in that unit the record was encoded."""
        by_unit = {int(latents.unit_of[twin]): twin for twin in reversed(twins)}
        needed = (int(latents.unit_of[row]) for micro in self._from_the_start() if micro.epoch >= latents.number for row in micro.samples)
        return next(by_unit[unit] for unit in needed if unit in by_unit)


def _require_images(present: Sequence[EpochLatents]) -> None:
    """Raise DataError where every image of a dataset could not be encoded."""
    for latents in present:
        failed = latents.data.catalogue.failures()
        for dataset, rows in latents.rows.items():
            images = latents.plan.columns["row"][rows].tolist()
            if all(image in failed for image in images):
                entry = latents.data.datasets[dataset]
                raise DataError(
                    f"dataset {entry.id!r}: none of its {len(images):,} images in {latents.data.sources[entry.id].name} could be encoded;"
                    f" {latents.data.catalogue.sample(images[0]).key}: {failed[images[0]]}."
                )
