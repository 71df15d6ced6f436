"""From data sets to training data: scan, plan, report, encode what is missing, let the encoders go.

Nothing here depends on what an earlier run did, only on what is on disk: a second start finds everything there, opens no image and
loads no encoder. The first process scans and plans, the others read its plan; all of them encode, each its share. What is encoded while
training runs (behind.py) is only looked for here.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig
from helpers.data.batches import BatchMaker
from helpers.data.behind import LatentsAhead
from helpers.data.buckets import BucketPlan, DatasetColumns, plan
from helpers.data.cache import Cache, record_key
from helpers.data.catalogue import Catalogue
from helpers.data.faces import find_faces
from helpers.data.fill import Filled, FillOptions, available_threads
from helpers.data.fingerprint import DataFingerprint
from helpers.data.latents import EVERY_EPOCH, LatentFiller, Unit, encode_units, refuse_without_images
from helpers.data.order import FROM_THE_BEGINNING, EpochOrder, OrderStart, Share
from helpers.data.passes import HeldCodec, Pass, Passes
from helpers.data.planning import columns_of, load_plan, rules_of, save_plan, without_a_face
from helpers.data.progress import bar, late_bar
from helpers.data.report import dataset_report, lost_line, mix_summary, summary
from helpers.data.scan import ScanResult, scan
from helpers.data.sources import CachePlace, latents_place, open_source, texts_place
from helpers.data.texts import TextFiller, text_key
from helpers.data.training_data import CachedRecords, PreparedDataset, Recall, Steps, TrainingData
from helpers.data.workers import Workers
from helpers.storage.atomic import write_json

if TYPE_CHECKING:
    from helpers.protocols import ModelFamily, Reporter, TextEncoders


@dataclass(frozen=True)
class DataSettings:
    """What the preparation of data needs to know besides the data sets."""

    output_dir: Path  # dataset_report.json goes here
    cache_dir: Path  # the catalogue and the plan go here
    text_cache_dir: Path  # for the extra captions and the unconditional
    device: torch.device  # that encodes
    seed: int
    batch_size: int
    accumulation: int = 1  # micro-batches of one process in a step
    caption_dropout: float = 0.0
    cache_dtype: str = "auto"  # auto, fp16, bf16 or fp32
    vae_batch_size: int = 4
    text_batch_size: int = 16
    threads: int = field(default_factory=available_threads)  # that read, decode and resize, over all processes
    extra_captions: Sequence[str] = ()  # that the run needs besides those of the data, such as validation prompts
    behind: bool = False  # encode latents while training runs
    step: int = 0  # training begins with, counted from 0
    order: OrderStart = FROM_THE_BEGINNING
    # By data set, the images that were left out as undecodable when the run began; None for a run that begins now.
    undecodable: Mapping[str, Sequence[str]] | None = None


def prepare_data(
    datasets: Sequence[DatasetConfig], settings: DataSettings, family: ModelFamily, workers: Workers, report: Reporter
) -> TrainingData:
    """Everything on disk that training needs to begin, and the way to it.

    The family's encoders must know their fingerprint without loading weights, so that a start that lacks nothing loads none.
    DataError where training cannot start from what is there, StorageError where a store fails, Interrupted, after keeping what has
    been encoded, when the user asked to stop.
    """
    preparation = _Preparation(datasets, settings, family, workers, report)
    preparation.scan_and_plan()
    if settings.behind:
        preparation.encode_captions()
        preparation.look_for_images()
    else:
        preparation.encode_images()
        preparation.encode_captions()
    preparation.tell_of_failures()
    return preparation.training_data()


class _Preparation:
    """The steps of `prepare_data`; each leaves here what the next ones need."""

    def __init__(
        self, datasets: Sequence[DatasetConfig], settings: DataSettings, family: ModelFamily, workers: Workers, report: Reporter
    ) -> None:
        self.datasets = datasets
        self.settings = settings
        self.family = family
        self.workers = workers
        self.report = report
        self.sources = [open_source(dataset) for dataset in datasets]
        self.scanned: list[ScanResult] = []  # in the first process
        self.faceless: dict[str, NDArray[np.int64]] = {}  # there too
        self.told: dict[int, str] = {}  # failures that stand in the report
        self.encoder_fingerprints: dict[str, str] = {}

    # -- scan and plan --------------------------------------------------------------------------------------------------

    def scan_and_plan(self) -> None:
        plan_folder = self.settings.cache_dir / "plan"
        catalogue_file = self.settings.cache_dir / "catalogue.sqlite"
        with self.workers.phase():
            if self.workers.is_first:
                self.catalogue = Catalogue(catalogue_file)
                self.catalogue.forget_failures()
                self.scanned = [self._scan(index) for index in range(len(self.datasets))]
                for index in range(len(self.datasets)):
                    self._find_faces(index)
                columns = self._columns(0)
                self.faceless = without_a_face(columns)
                save_plan(plan(columns), plan_folder)
        if not self.workers.is_first:
            self.catalogue = Catalogue(catalogue_file)
        self.plan = load_plan(plan_folder)
        with self.workers.phase():
            if self.workers.is_first:
                self._write_report({})
                for index, result in enumerate(self.scanned):
                    shapes = np.unique(self.plan.columns["shape"][self.plan.columns["dataset"] == index])
                    self.report.chapter("dataset", summary(result, len(shapes)))
                    if faceless := len(self.faceless.get(result.dataset, ())):
                        told = f"none found in {faceless:,} of {result.used:,} images, which are cut in the middle"
                        self.report.chapter("faces", f"{result.dataset}: {told}")

    def _scan(self, index: int) -> ScanResult:
        rules = rules_of(self.datasets[index], self.settings.seed)
        left_out = self.settings.undecodable
        with late_bar(self.report, f"scan {rules.dataset}", "files") as told:
            return scan(
                self.sources[index],
                rules,
                self.catalogue,
                on_progress=told,
                should_stop=self.workers.should_stop,
                undecodable=None if left_out is None else left_out.get(rules.dataset, ()),
            )

    def _find_faces(self, index: int) -> None:
        if rules_of(self.datasets[index]).resolution.style != "face":
            return
        with late_bar(self.report, f"find faces {self.datasets[index].id}", "images") as told:
            find_faces(
                self.sources[index],
                self.datasets[index].id,
                self.catalogue,
                threads=self.settings.threads,
                on_progress=told,
                should_stop=self.workers.should_stop,
            )

    def _columns(self, epoch: int) -> list[DatasetColumns]:
        return [columns_of(dataset, self.catalogue, self.settings.seed, epoch) for dataset in self.datasets]

    def _plan_of(self, epoch: int) -> BucketPlan:
        return plan(self._columns(epoch))

    def _write_report(self, failed: Mapping[int, str]) -> None:
        report = dataset_report(self.scanned, self.plan, self.catalogue, self.faceless, failed)
        write_json(self.settings.output_dir / "dataset_report.json", report)

    # -- images ---------------------------------------------------------------------------------------------------------

    def encode_images(self) -> None:
        """Encode what is missing for the epoch that training begins in, which for most data sets is what every epoch needs."""
        with self.workers.phase():
            self._open_passes()
            units = list(self._units_of_this_process()) if any(passed.incomplete for passed in self.present_passes) else []
            filled = self._fill_images(units)
        total = self._all([filled])
        for passed in self.present_passes:
            if passed.incomplete:
                # Not only what was encoded: an image whose bytes were known under another name is found once it was read.
                passed.locate()
        if not any(self.passes.redrawn):
            self.codec.close()
        self.report.chapter("latents", total.describe(len(self.plan), "the VAE"))
        failed = self.catalogue.failures()
        for passed in self.present_passes:
            for filler in passed.fillers.values():
                refuse_without_images(filler, failed)

    def look_for_images(self) -> None:
        """Find out what is cached, and load the codec where that is not all."""
        with self.workers.phase():
            self._open_passes()
        cached = sum(int(passed.there(filler.rows).sum()) for passed in self.present_passes for filler in passed.fillers.values())
        behind = "; the rest is encoded while training runs" if cached < len(self.plan) else ""
        self.report.chapter("latents", f"{len(self.plan):,} needed, {cached:,} cached{behind}")

    def _open_passes(self) -> None:
        settings = self.settings
        redrawn = [dataset.vae_cache_clear_each_epoch for dataset in self.datasets]
        self.codec = HeldCodec(self.family, settings.device)
        self.encoder_fingerprints["image_codec"] = f"{self.codec.fingerprint} {settings.cache_dtype}"
        self.latent_caches = _open_caches([latents_place(dataset, settings.cache_dir) for dataset in self.datasets], self.report)
        self.passes = Passes(self.plan, redrawn, self._plan_of, self._fillers, settings.vae_batch_size, settings.cache_dtype)
        self.steps = Steps(self._order(), settings.accumulation, self.workers.rank, self.workers.world_size)
        self.first_epoch = self.steps.epoch(settings.step, settings.order)
        if self.workers.is_first:
            self._remove_passes(self.first_epoch)
        numbers = [*([EVERY_EPOCH] if not all(redrawn) else []), *([self.first_epoch] if any(redrawn) else [])]
        self.present_passes: list[Pass] = [self.passes.at(number) for number in numbers]
        self.codec.open()

    def _fillers(self, plan: BucketPlan, datasets: Sequence[int], number: int) -> dict[int, LatentFiller]:
        caches = self.latent_caches
        if number != EVERY_EPOCH:
            caches = _open_caches([CachePlace(self._pass_folder(dataset, number)) for dataset in self.datasets], self.report)
        return {
            index: LatentFiller(plan, index, self.sources[index], self.catalogue, caches[index], self.codec, number) for index in datasets
        }

    def _units_of_this_process(self) -> Iterator[Unit]:
        """What this process has to encode before training begins: in the order of need, as it would be encoded behind training."""
        for met, unit in enumerate(self._units()):
            if met % self.workers.world_size == self.workers.rank and self.passes.lacks(unit):
                yield unit

    def _units(self) -> Iterator[Unit]:
        for micro in self.steps.all(self.settings.step, self.settings.order):
            if micro.epoch > self.first_epoch or self.passes.all_taken:
                break
            yield from self.passes.take(micro)
        for passed in self.present_passes:
            yield from passed.take_rest()

    def _fill_images(self, units: Sequence[Unit]) -> Filled:
        if not units:
            return Filled()
        with bar(self.report, "encode images", sum(len(rows) for _, rows in units), "images") as progress:
            options = dataclasses.replace(self._options(self.settings.vae_batch_size), progress=progress)
            return encode_units(units, self.catalogue, options)

    def _pass_folder(self, dataset: DatasetConfig, epoch: int) -> Path:
        """Latents of one epoch of this run, beside those of every epoch. Other runs may share the folder that it lies in."""
        return self._parent_of_passes(dataset) / f"{self._pass_prefix}{epoch}"

    def _parent_of_passes(self, dataset: DatasetConfig) -> Path:
        """The folder of its latents; of those in a bucket, the one with the copies of their shards."""
        return latents_place(dataset, self.settings.cache_dir).folder

    @property
    def _pass_prefix(self) -> str:
        run = record_key(str(self.settings.output_dir.absolute()), str(self.settings.seed)).hex()[:12]
        return f"epoch-{run}-"

    def _remove_passes(self, before: int) -> None:
        """Remove this run's latents of single epochs before one."""
        for folder in {self._parent_of_passes(dataset) for dataset in self.datasets if dataset.vae_cache_clear_each_epoch}:
            for found in folder.glob(f"{self._pass_prefix}*"):
                if int(found.name.removeprefix(self._pass_prefix)) < before:
                    shutil.rmtree(found, ignore_errors=True)  # a rest that cannot be removed costs space, and no run

    # -- captions -------------------------------------------------------------------------------------------------------

    def encode_captions(self) -> None:
        places = [texts_place(dataset, self.settings.cache_dir) for dataset in self.datasets]
        places.append(self._place_of_extra_captions())
        options = self._options(self.settings.text_batch_size)
        wanted = [list(self.catalogue.captions(dataset.id)) for dataset in self.datasets]
        wanted.append(sorted({"", *self.settings.extra_captions}))
        with self.family.text_encoders(self.settings.device) as encoders:
            with self.workers.phase():
                self.text_caches = _open_caches(places, self.report)
                filled = [
                    self._fill_captions(TextFiller(cache, encoders), captions, options)
                    for cache, captions in zip(self.text_caches, wanted, strict=True)
                ]
                self._fill_unconditional(encoders, options)
            self.text_fingerprint = encoders.fingerprint
            cut_off = sum(map(int, self.workers.gather(str(encoders.truncated))))
        self.extra_captions = wanted[-1]
        self.encoder_fingerprints["text_encoders"] = f"{self.text_fingerprint} {options.cache_dtype}"
        needed = sum(map(len, wanted))
        self.report.chapter("text", self._all(filled).describe(needed, "the text encoders"))
        if cut_off:
            self.report.chapter("", f"{cut_off:,} captions are longer than the text encoders read, and were cut off")

    def _place_of_extra_captions(self) -> CachePlace:
        """Beside those of the data where these are in a bucket by default, or else another machine would have to encode them."""
        by_default = (dataset for dataset in self.datasets if dataset.text_entry is not None and dataset.text_entry.default)
        dataset = next(by_default, None)
        return CachePlace(self.settings.text_cache_dir.absolute()) if dataset is None else texts_place(dataset, self.settings.cache_dir)

    def _fill_captions(self, filler: TextFiller, captions: Sequence[str], options: FillOptions) -> Filled:
        pending = filler.pending(captions, options)
        if not pending:
            return Filled()
        with bar(self.report, "encode captions", sum(map(len, pending)), "captions") as progress:
            return filler.encode(pending, dataclasses.replace(options, progress=progress))

    def _fill_unconditional(self, encoders: TextEncoders, options: FillOptions) -> None:
        cache = self.text_caches[-1]
        key = text_key(None, encoders.fingerprint, options.cache_dtype)
        if self.workers.is_first and not cache.find([key])["shard"][0]:
            TextFiller(cache, encoders).keep(None, self.family.unconditional(encoders), options)

    # -- the end ----------------------------------------------------------------------------------------------------------

    def tell_of_failures(self) -> None:
        """Bring the report up to date with the images that could not be encoded. Only the first process does anything."""
        failed = self.catalogue.failures() if self.workers.is_first else {}
        if failed == self.told:
            return
        self.told = failed
        self._write_report(failed)
        self.report.chapter("dataset", lost_line(failed))

    def training_data(self) -> TrainingData:
        settings, workers = self.settings, self.workers
        recall = Recall(
            self.family,
            settings.device,
            self.text_fingerprint,
            dataclasses.replace(self._options(settings.vae_batch_size), world_size=1, should_stop=lambda: False),
            dataclasses.replace(self._options(settings.text_batch_size), world_size=1, should_stop=lambda: False),
        )
        ahead = self._ahead()
        records = CachedRecords(
            self.passes,
            [
                PreparedDataset(texts, dataset.loss_weight, dataset.is_regularisation_data)
                for dataset, texts in zip(self.datasets, self.text_caches[:-1], strict=True)
            ],
            self.catalogue,
            recall,
            unconditional=recall.text(self.text_caches[-1], None, lambda: []),
            ahead=ahead,
            are_remote=any(cache.remote for cache in (*self.latent_caches, *self.text_caches)),
        )
        left_out = settings.undecodable
        if left_out is None:
            left_out = {dataset.id: self.catalogue.undecodable(dataset.id) for dataset in self.datasets}
        if len(self.datasets) > 1:
            self.report.chapter("mix", mix_summary(self.plan.datasets, self.steps.order.mix))
        return TrainingData(
            records,
            self.steps,
            BatchMaker(records, settings.seed, settings.caption_dropout),
            fingerprint=self._fingerprint(),
            undecodable=left_out,
            tell_of_failures=self.tell_of_failures,
            remove_passes=self._remove_passes if workers.is_first else lambda before: None,
            needed=lambda: Steps(self._order(), settings.accumulation, workers.rank, workers.world_size),
            extra_texts=self.text_caches[-1],
            extra_captions=self.extra_captions,
        )

    def _order(self) -> EpochOrder:
        """The order of the whole plan: images that turn out not to be encodable leave their places empty."""
        shares = [Share(dataset.repeats, dataset.probability, dataset.ignore_epochs) for dataset in self.datasets]
        columns = self.plan.columns
        return EpochOrder(columns["shape"], columns["dataset"], shares, self.settings.batch_size, self.settings.seed)

    def _ahead(self) -> LatentsAhead | None:
        """What encodes behind training, with its codec loaded; None where nothing is left to encode."""
        if not (any(self.passes.redrawn) or any(passed.incomplete for passed in self.present_passes)):
            self.codec.close()
            return None
        self.codec.warm_up()
        return LatentsAhead(self.passes, self.codec, self.catalogue, self._options(self.settings.vae_batch_size))

    def _fingerprint(self) -> DataFingerprint:
        fixed = {
            "repeats": ", ".join(f"{dataset.id} {dataset.repeats}" for dataset in self.datasets),
            "redrawn": ", ".join(dataset.id for dataset in self.datasets if dataset.vae_cache_clear_each_epoch),
            "mix": ", ".join(_part_in_the_mix(dataset) for dataset in self.datasets),
            "batch_size": str(self.settings.batch_size),
            **self.encoder_fingerprints,
        }
        return DataFingerprint(self.plan, self.datasets, self.sources, self.catalogue, fixed)

    def _options(self, batch_size: int) -> FillOptions:
        return FillOptions(
            batch_size=batch_size,
            cache_dtype=self.settings.cache_dtype,
            threads=max(1, self.settings.threads // self.workers.world_size),
            rank=self.workers.rank,
            world_size=self.workers.world_size,
            should_stop=self.workers.should_stop,
        )

    def _all(self, filled: Sequence[Filled]) -> Filled:
        """What filling came to over all data sets and all processes."""
        mine, total = Filled(), Filled()
        for part in filled:
            mine.add(part)
        shares = [Filled.from_json(text) for text in self.workers.gather(mine.to_json())]
        for share in shares:
            total.add(share)
        total.encoding_seconds = max(share.encoding_seconds for share in shares)  # the processes work at the same time
        total.waiting_seconds = max(share.waiting_seconds for share in shares)
        return total


def _part_in_the_mix(dataset: DatasetConfig) -> str:
    asked = "by size" if dataset.probability is None else f"{dataset.probability:g}"
    return f"{dataset.id} {asked}{' without holding epochs open' if dataset.ignore_epochs else ''}"


def _open_caches(places: Iterable[CachePlace], report: Reporter) -> list[Cache]:
    """A cache for each place; the same one where places are the same."""
    caches: dict[Path, Cache] = {}
    opened = []
    for place in places:
        if place.folder not in caches:
            caches[place.folder] = place.open()
            for note in caches[place.folder].notes:
                report.chapter("cache", note)
        opened.append(caches[place.folder])
    return opened
