"""The part of the preparation that is about latents: what is encoded before training, and what is left to be encoded behind it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from helpers.config.datasets import DatasetConfig
from helpers.data.base.progress import bar
from helpers.data.base.workers import Workers
from helpers.data.cache.index import LOCATION, Locations
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.encode.background import BackgroundEncoder
from helpers.data.encode.conditions import Conditions
from helpers.data.encode.fill import Filled, gathered
from helpers.data.encode.latents import EVERY_EPOCH, LatentEncoder, Unit, encode_units, refuse_without_images
from helpers.data.encode.passes import HeldCodec, Pass, Passes
from helpers.data.order.epoch_order import EpochOrder, MicroBatch, Share
from helpers.data.plan.buckets import BucketPlan
from helpers.data.planning import plan_inputs
from helpers.data.settings import DataSettings
from helpers.data.sources import CachePlace, latents_place, open_caches, pass_prefix
from helpers.data.training_data import Steps
from helpers.storage.backend import SourceBackend
from helpers.storage.memo import Memo, digest_of

if TYPE_CHECKING:
    from helpers.data.ports import DataReporter, ModelEncoders


class LatentPhase:
    """First `encode` or `look`, then `ahead`. `plan` is that of epoch 0, `plan_of` gives those of others."""

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        sources: Sequence[SourceBackend],
        conditions: Sequence[Conditions | None],
        catalogue: Catalogue,
        plan: BucketPlan,
        plan_of: Callable[[int], BucketPlan],
        settings: DataSettings,
        family: ModelEncoders,
        workers: Workers,
        report: DataReporter,
    ) -> None:
        self.datasets = datasets
        self.sources = sources
        self.conditions = conditions
        self.catalogue = catalogue
        self.plan = plan
        self.plan_of = plan_of
        self.settings = settings
        self.family = family
        self.workers = workers
        self.report = report
        self.are_remote = False  # whether latents are read from a network
        self.memo = Memo(settings.cache_dir / "memo")

    def encode(self) -> None:
        """Encode what is missing for the epoch that training begins in, which for most data sets is what every epoch needs."""
        with self.workers.phase():
            self._open()
            units = list(self._units_of_this_process()) if any(passed.incomplete for passed in self.present_passes) else []
            filled = self._fill_images(units)
        total = gathered([filled], self.workers)
        for passed in self.present_passes:
            if passed.incomplete:
                # Not only what was encoded: an image whose bytes were known under another name is found once it was read.
                passed.locate()
        if not any(self.passes.redrawn):
            self.codec.close()
        self._remember()
        self.report.chapter("latents", total.describe(len(self.plan), "encoding"))
        failed = self.catalogue.failures()
        for passed in self.present_passes:
            for filler in passed.fillers.values():
                refuse_without_images(filler, failed)

    def look(self) -> None:
        """Find out what is cached, and load the codec where that is not all."""
        with self.workers.phase():
            self._open()
        cached = sum(int(passed.there(filler.rows).sum()) for passed in self.present_passes for filler in passed.fillers.values())
        behind = "; the rest is encoded while training runs" if cached < len(self.plan) else ""
        self.report.chapter("latents", f"{len(self.plan):,} needed, {cached:,} cached{behind}")

    def _open(self) -> None:
        settings = self.settings
        redrawn = [dataset.vae_cache_clear_each_epoch for dataset in self.datasets]
        self.codec = HeldCodec(self.family, settings.device)
        of_images = (settings.vae_batch_size, settings.cache_dtype)
        self.passes = Passes(self.plan, redrawn, self.plan_of, self._fillers, *of_images, known=self._known)
        self.steps = self.new_steps()
        self.first_epoch = self.steps.epoch(settings.step, settings.order)
        self.remove_passes(self.first_epoch)
        numbers = [*([EVERY_EPOCH] if not all(redrawn) else []), *([self.first_epoch] if any(redrawn) else [])]
        self.present_passes: list[Pass] = [self.passes.at(number) for number in numbers]
        self.codec.open()

    def _known(self, made: Pass) -> Locations | None:
        """Where all latents lie, if nothing that this depends on has changed since an earlier start looked them up."""
        if made.number != EVERY_EPOCH:
            return None
        known = self.memo.load_bytes("locations", self._inputs(made))
        return None if known is None else np.frombuffer(known, LOCATION).copy()

    def _remember(self) -> None:
        """Keep for the next start where all latents lie. Only the first process does anything."""
        for passed in self.present_passes:
            if self.workers.is_first and passed.number == EVERY_EPOCH and not passed.incomplete and not passed.hopeless.any():
                inputs = self._inputs(passed)
                if self.memo.load_bytes("locations", inputs) is None:
                    self.memo.save_bytes("locations", inputs, passed.locations.tobytes())

    def _inputs(self, passed: Pass) -> str:
        """Everything that the places of a pass's latents depend on."""
        caches = [filler.cache.revision() for filler in passed.fillers.values()]
        images = plan_inputs(self.datasets, self.catalogue, self.settings.seed)
        return digest_of(images, self.codec.fingerprint, caches, self.settings.cache_dtype, LOCATION.descr)

    def ahead(self) -> BackgroundEncoder | None:
        """What encodes behind training, with its codec loaded; None where nothing is left to encode."""
        if not (any(self.passes.redrawn) or any(passed.incomplete for passed in self.present_passes)):
            self.codec.close()
            return None
        self.codec.warm_up()
        options = self.settings.fill_options(self.settings.vae_batch_size, self.workers)
        return BackgroundEncoder(self.passes, self.codec, self.catalogue, options)

    def from_the_start(self) -> Iterator[MicroBatch]:
        """The micro-batches of all processes from the beginning of the order."""
        return self.new_steps().all(self.settings.order.step, self.settings.order)

    def new_steps(self) -> Steps:
        """The order of the whole plan: images that turn out not to be encodable leave their places empty."""
        shares = [Share(dataset.repeats, dataset.probability, dataset.ignore_epochs) for dataset in self.datasets]
        columns = self.plan.columns
        shapes = (lambda epoch: self.plan_of(epoch).columns["shape"]) if self._shapes_are_redrawn else columns["shape"]
        order = EpochOrder(shapes, columns["dataset"], shares, self.settings.batch_size, self.settings.seed)
        return Steps(order, self.settings.accumulation, self.workers.rank, self.workers.world_size)

    @property
    def _shapes_are_redrawn(self) -> bool:
        """Whether epochs differ in the shapes of their samples, and so perhaps in the number of micro-batches."""
        return any(dataset.redraws_aspects for dataset in self.datasets)

    def _fillers(self, plan: BucketPlan, datasets: Sequence[int], number: int) -> dict[int, LatentEncoder]:
        places = [self._place(self.datasets[index], number) for index in datasets]
        caches = open_caches(places, lambda note: self.report.chapter("cache", note))
        self.are_remote = self.are_remote or any(cache.remote for cache in caches)
        return {
            index: LatentEncoder(plan, index, self.sources[index], self.catalogue, cache, self.codec, number, self.conditions[index])
            for index, cache in zip(datasets, caches, strict=True)
        }

    def _units_of_this_process(self) -> Iterator[Unit]:
        """What this process has to encode before training begins: in the order of need, as it would be encoded behind training."""
        for met, unit in enumerate(self._units()):
            if met % self.workers.world_size == self.workers.rank and self.passes.lacks(unit):
                yield unit

    def _units(self) -> Iterator[Unit]:
        # Of the same image under several names, the first one that is encoded is kept: so always from the start.
        for micro in self.from_the_start():
            if micro.epoch > self.settings.order.epoch or self.passes.all_taken:
                break
            yield from self.passes.take(micro, EVERY_EPOCH)
        for micro in self.steps.all(self.settings.step, self.settings.order):
            if micro.epoch > self.first_epoch or not any(self.passes.redrawn):
                break
            yield from self.passes.take(micro)
        for passed in self.present_passes:
            yield from passed.take_rest()

    def _fill_images(self, units: Sequence[Unit]) -> Filled:
        if not units:
            return Filled()
        with bar(self.report, "encode images", sum(len(rows) for _, rows in units), "images") as progress:
            options = dataclasses.replace(self.settings.fill_options(self.settings.vae_batch_size, self.workers), progress=progress)
            return encode_units(units, self.catalogue, options)

    def _place(self, dataset: DatasetConfig, number: int) -> CachePlace:
        """Latents of one epoch lie on this machine, wherever those of every epoch do."""
        place = latents_place(dataset, self.settings.cache_dir)
        return place if number == EVERY_EPOCH else CachePlace(place.folder / f"{self._pass_prefix}{number}")

    @property
    def _pass_prefix(self) -> str:
        return pass_prefix(self.settings.output_dir, self.settings.seed)

    def remove_passes(self, before: int) -> None:
        """Remove this run's latents of single epochs before one. Only the first process does anything."""
        if not self.workers.is_first:
            return
        redrawn = [dataset for dataset in self.datasets if dataset.vae_cache_clear_each_epoch]
        for folder in {latents_place(dataset, self.settings.cache_dir).folder for dataset in redrawn}:
            for found in folder.glob(f"{self._pass_prefix}*"):
                if int(found.name.removeprefix(self._pass_prefix)) < before:
                    shutil.rmtree(found, ignore_errors=True)  # a rest that cannot be removed costs space, and no run
