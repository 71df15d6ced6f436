"""From data sets to training data: scan, plan, report, encode what is missing, let the encoders go.

Nothing here depends on what an earlier run did, only on what is on disk: a second start finds everything there, opens no image and
loads no encoder. The first process scans and plans, the others read its plan; all of them encode, each its share. What is encoded while
training runs (behind.py) is only looked for here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from helpers.config.datasets import DatasetConfig
from helpers.data.batches import BatchMaker
from helpers.data.buckets import BucketPlan, plan
from helpers.data.cache import open_caches
from helpers.data.catalogue import Catalogue
from helpers.data.fill import Filled, FillOptions, gathered
from helpers.data.fingerprint import DataFingerprint
from helpers.data.latent_phase import LatentPhase
from helpers.data.planning import columns_of, load_plan, rules_of, save_plan
from helpers.data.progress import bar, late_bar
from helpers.data.report import dataset_report, lost_line, mix_summary, summary
from helpers.data.scan import ScanResult, scan
from helpers.data.settings import DataSettings
from helpers.data.sources import open_source
from helpers.data.texts import TextFiller, text_key
from helpers.data.training_data import CachedRecords, PreparedDataset, Recall, TrainingData
from helpers.data.workers import Workers
from helpers.storage.atomic import write_json

if TYPE_CHECKING:
    from helpers.protocols import ModelFamily, Reporter, TextEncoders


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
        preparation.images.look()
    else:
        preparation.images.encode()
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
        self.told: dict[int, str] = {}  # failures that stand in the report

    # -- scan and plan --------------------------------------------------------------------------------------------------

    def scan_and_plan(self) -> None:
        plan_folder = self.settings.cache_dir / "plan"
        catalogue_file = self.settings.cache_dir / "catalogue.sqlite"
        with self.workers.phase():
            if self.workers.is_first:
                self.catalogue = Catalogue(catalogue_file)
                self.catalogue.forget_failures()
                self.scanned = [self._scan(index) for index in range(len(self.datasets))]
                save_plan(self._plan_of(0), plan_folder)
        if not self.workers.is_first:
            self.catalogue = Catalogue(catalogue_file)
        self.plan = load_plan(plan_folder)
        parts = (self.datasets, self.sources, self.catalogue, self.plan, self._plan_of)
        self.images = LatentPhase(*parts, self.settings, self.family, self.workers, self.report)
        with self.workers.phase():
            if self.workers.is_first:
                write_json(self.settings.output_dir / "dataset_report.json", dataset_report(self.scanned, self.plan, self.catalogue))
                for index, result in enumerate(self.scanned):
                    shapes = np.unique(self.plan.columns["shape"][self.plan.columns["dataset"] == index])
                    self.report.chapter("dataset", summary(result, len(shapes)))

    def _scan(self, index: int) -> ScanResult:
        rules = rules_of(self.datasets[index])
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

    def _plan_of(self, epoch: int) -> BucketPlan:
        return plan([columns_of(dataset, self.catalogue, self.settings.seed, epoch) for dataset in self.datasets])

    # -- captions -------------------------------------------------------------------------------------------------------

    def encode_captions(self) -> None:
        folders = [*(dataset.text_cache_dir for dataset in self.datasets), self.settings.text_cache_dir]
        options = self.settings.fill_options(self.settings.text_batch_size, self.workers)
        wanted = [list(self.catalogue.captions(dataset.id)) for dataset in self.datasets]
        wanted.append(sorted({"", *self.settings.extra_captions}))
        with self.family.text_encoders(self.settings.device) as encoders:
            with self.workers.phase():
                self.text_caches = open_caches(folders, lambda note: self.report.chapter("cache", note))
                filled = [
                    self._fill_captions(TextFiller(cache, encoders), captions, options)
                    for cache, captions in zip(self.text_caches, wanted, strict=True)
                ]
                self._fill_unconditional(encoders, options)
            self.text_fingerprint = encoders.fingerprint
            cut_off = sum(map(int, self.workers.gather(str(encoders.truncated))))
        self.extra_captions = wanted[-1]
        needed = sum(map(len, wanted))
        self.report.chapter("text", gathered(filled, self.workers).describe(needed, "the text encoders"))
        if cut_off:
            self.report.chapter("", f"{cut_off:,} captions are longer than the text encoders read, and were cut off")

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
        report = dataset_report(self.scanned, self.plan, self.catalogue, failed)
        write_json(self.settings.output_dir / "dataset_report.json", report)
        self.report.chapter("dataset", lost_line(failed))

    def training_data(self) -> TrainingData:
        settings, workers = self.settings, self.workers
        recall = Recall(
            self.family,
            settings.device,
            self.text_fingerprint,
            dataclasses.replace(settings.fill_options(settings.vae_batch_size, workers), world_size=1, should_stop=lambda: False),
            dataclasses.replace(settings.fill_options(settings.text_batch_size, workers), world_size=1, should_stop=lambda: False),
        )
        images = self.images
        records = CachedRecords(
            images.passes,
            [
                PreparedDataset(texts, dataset.loss_weight, dataset.is_regularisation_data)
                for dataset, texts in zip(self.datasets, self.text_caches[:-1], strict=True)
            ],
            self.catalogue,
            recall,
            unconditional=recall.text(self.text_caches[-1], None, lambda: []),
            from_the_start=images.from_the_start,
            ahead=images.ahead(),
        )
        left_out = settings.undecodable
        if left_out is None:
            left_out = {dataset.id: self.catalogue.undecodable(dataset.id) for dataset in self.datasets}
        if len(self.datasets) > 1:
            self.report.chapter("mix", mix_summary(self.plan.datasets, images.steps.order.mix))
        return TrainingData(
            records,
            images.steps,
            BatchMaker(records, settings.seed, settings.caption_dropout),
            fingerprint=self._fingerprint(),
            undecodable=left_out,
            tell_of_failures=self.tell_of_failures,
            remove_passes=images.remove_passes,
            needed=images.new_steps,
            extra_texts=self.text_caches[-1],
            extra_captions=self.extra_captions,
        )

    def _fingerprint(self) -> DataFingerprint:
        fixed = {
            "repeats": ", ".join(f"{dataset.id} {dataset.repeats}" for dataset in self.datasets),
            "redrawn": ", ".join(dataset.id for dataset in self.datasets if dataset.vae_cache_clear_each_epoch),
            "mix": ", ".join(_part_in_the_mix(dataset) for dataset in self.datasets),
            "batch_size": str(self.settings.batch_size),
            "image_codec": f"{self.images.codec.fingerprint} {self.settings.cache_dtype}",
            "text_encoders": f"{self.text_fingerprint} {self.settings.cache_dtype}",
        }
        return DataFingerprint(self.plan, self.datasets, self.sources, self.catalogue, fixed)


def _part_in_the_mix(dataset: DatasetConfig) -> str:
    asked = "by size" if dataset.probability is None else f"{dataset.probability:g}"
    return f"{dataset.id} {asked}{' without holding epochs open' if dataset.ignore_epochs else ''}"
