"""From data sets to training data: scan, plan, report, encode what is missing, let the encoders go.

Nothing here depends on what an earlier run did, only on what is on disk: a second start finds everything there, opens no image and
loads no encoder. The first process scans and plans, the others read its plan; all of them encode, each its share. What is encoded while
training runs (behind.py) is only looked for here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig
from helpers.data.base.progress import bar, late_bar
from helpers.data.base.workers import Workers
from helpers.data.batches import BatchMaker
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.faces import find_faces
from helpers.data.catalogue.scan import DatasetRules, Refreshed, ScanOptions, ScanResult, judge, refresh, scan
from helpers.data.encode.conditions import Conditions
from helpers.data.encode.fill import Filled, FillOptions, gathered
from helpers.data.encode.latent_phase import LatentPhase
from helpers.data.encode.texts import TextFiller, text_key
from helpers.data.fingerprint import DataFingerprint
from helpers.data.plan.buckets import BucketPlan, DatasetColumns, plan
from helpers.data.planning import (
    columns_of,
    conditions_of,
    has_plan,
    load_plan,
    plan_inputs,
    restricted,
    rules_of,
    rules_of_conditions,
    save_plan,
    without_a_face,
)
from helpers.data.ports import DataReporter, ModelEncoders, TextEncoders, reads_conditions
from helpers.data.report.dataset_report import (
    REPORT,
    caption_report,
    conditions_report,
    cut_off_line,
    dataset_report,
    lost_line,
    mix_summary,
    summary,
)
from helpers.data.report.survey import Survey
from helpers.data.report.thumbnails import thumbnails
from helpers.data.settings import DataSettings
from helpers.data.sources import extra_texts_place, open_caches, open_source, texts_place
from helpers.data.training_data import CachedRecords, PreparedDataset, Recall, TrainingData
from helpers.storage.atomic import write_json
from helpers.storage.memo import Memo, digest_of

if TYPE_CHECKING:
    from helpers.data.cache.cache import Cache


def prepare_data(
    datasets: Sequence[DatasetConfig], settings: DataSettings, family: ModelEncoders, workers: Workers, report: DataReporter
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


def survey_data(
    datasets: Sequence[DatasetConfig], settings: DataSettings, family: ModelEncoders, workers: Workers, report: DataReporter
) -> None:
    """Scan, plan and report as `prepare_data` does, and encode nothing. Raises the same errors."""
    preparation = _Preparation(datasets, settings, family, workers, report)
    preparation.is_survey = True
    preparation.scan_and_plan()


class _Preparation:
    """The steps of `prepare_data`; each leaves here what the next ones need."""

    def __init__(
        self, datasets: Sequence[DatasetConfig], settings: DataSettings, family: ModelEncoders, workers: Workers, report: DataReporter
    ) -> None:
        self.datasets = datasets
        self.settings = settings
        self.family = family
        self.workers = workers
        self.report = report
        self.sources = [open_source(dataset) for dataset in datasets]
        self.condition_sets = conditions_of(datasets)
        self.condition_sources = {name: open_source(conditions) for name, conditions in self.condition_sets.items()}
        self.scanned: list[ScanResult] = []  # in the first process
        self.scanned_conditions: list[ScanResult] = []  # there too
        self.faceless: dict[str, NDArray[np.int64]] = {}  # there too
        self.told: dict[int, str] = {}  # failures that stand in the report
        self.is_survey = False  # then the report is what was asked for
        self.memo = Memo(settings.cache_dir / "memo")
        self.unread = 0  # images whose bytes were not known when the data was last surveyed; in the first process

    # -- scan and plan --------------------------------------------------------------------------------------------------

    def scan_and_plan(self) -> None:
        plan_folder = self.settings.cache_dir / "plan"
        catalogue_file = self.settings.cache_dir / "catalogue.sqlite"
        with self.workers.phase():
            if self.workers.is_first:
                self.catalogue = Catalogue(catalogue_file)
                self.catalogue.forget_failures()
                refreshed = {name: self._refresh_conditions(name) for name in self.condition_sets}
                self.scanned = [self._scan(index) for index in range(len(self.datasets))]
                self.scanned_conditions = [self._judge_conditions(name, found) for name, found in refreshed.items()]
                for index in range(len(self.datasets)):
                    self._find_faces(index)
                self._make_plan(plan_folder)
        if not self.workers.is_first:
            self.catalogue = Catalogue(catalogue_file)
        self.plan = load_plan(plan_folder)
        parts = (self.datasets, self.sources, self._conditions(), self.catalogue, self.plan, self._plan_of)
        self.images = LatentPhase(*parts, self.settings, self.family, self.workers, self.report)
        with self.workers.phase():
            if self.workers.is_first:
                is_news = self.is_survey or not self._is_surveyed()
                if is_news:
                    self._survey({})
                for index, result in enumerate(self.scanned):
                    shapes = np.bincount(self.plan.columns["shape"][self.plan.columns["dataset"] == index])
                    self.report.chapter("dataset", summary(result, int(np.count_nonzero(shapes))))
                    if faceless := len(self.faceless.get(result.dataset, ())):
                        told = f"none found in {faceless:,} of {result.used:,} images, which are cut in the middle"
                        self.report.chapter("faces", f"{result.dataset}: {told}")
                for result in self.scanned_conditions:
                    self.report.chapter("conditions", summary(result))
                if is_news:
                    self._tell_of_unread_captions()

    def _make_plan(self, folder: Path) -> None:
        """Lay the plan into a folder, unless the one that lies there was made from just the same."""
        has_faces = any(dataset.crop and dataset.crop_style == "face" for dataset in self.datasets)
        inputs = self._inputs()
        if not has_faces and self.memo.load_value("plan", inputs) is not None and has_plan(folder):
            return
        columns = self._columns(0)
        self.faceless = without_a_face(columns)
        self.memo.forget("plan")  # first: a start killed while it writes leaves files that no memo vouches for
        save_plan(plan(columns), folder)
        self.memo.save_value("plan", inputs, str(folder))

    def _inputs(self) -> str:
        return plan_inputs(self.datasets, self.catalogue, self.settings.seed)

    def _is_surveyed(self) -> bool:
        """Whether the report of an earlier start is there and still tells what there is to tell."""
        report = self.settings.output_dir / REPORT
        known = self.memo.load_value("survey", digest_of(self._inputs(), report))
        if known is None or self.faceless or not (report.is_file() and report.with_suffix(".html").is_file()):
            return False
        self.unread = known["unread"]
        return True

    def _survey(self, failed: Mapping[int, str]) -> None:
        """Write and tell what is known of the data: once when it is planned, and again when encoding has told more.

        `failed` are the images that could not be encoded: catalogue row => reason.
        """
        told = dataset_report(self.scanned, self.plan, self.catalogue, self.faceless, failed)
        if self.scanned_conditions:
            told["conditions"] = conditions_report(self.scanned_conditions, self.catalogue)
        lengths = self.family.caption_lengths()
        for entry in told["datasets"]:
            entry["captions"] = caption_report(entry["id"], self.catalogue, lengths, self.memo)
        self.told, self.unread = dict(failed), self._count_unread()
        report = self.settings.output_dir / REPORT
        write_json(report, told)
        trained = restricted(self.plan, np.flatnonzero(~np.isin(self.plan.columns["row"], list(failed)))) if failed else self.plan
        self.report.surveyed(Survey(told, lambda: thumbnails(trained, self.sources, self.catalogue, self.memo, self.settings.threads)))
        if not failed:
            self.memo.save_value("survey", digest_of(self._inputs(), report), {"unread": self.unread})

    def _tell_of_unread_captions(self) -> None:
        """Names of files are the default: who has written captions beside the pictures should not find out by the result."""
        for dataset in self.datasets:
            by_name = dataset.caption_strategy == "filename" and not dataset.only_instance_prompt
            if by_name and (count := self.catalogue.caption_files(dataset.id)):
                said = f"captions are the names of files, and {count:,} .txt beside them are not read; caption_strategy textfile reads them"
                self.report.chapter("captions", f"{dataset.id}: {said}")

    def _count_unread(self) -> int:
        return sum(self.catalogue.unread(dataset.id) for dataset in self.datasets)

    def _scan(self, index: int) -> ScanResult:
        rules = rules_of(self.datasets[index], self.settings.seed)
        left_out = self.settings.undecodable
        with late_bar(self.report, f"scan {rules.dataset}", "files") as told:
            options = ScanOptions(None, told, self.workers.should_stop, self.datasets[index].trusts_listing)
            undecodable = None if left_out is None else left_out.get(rules.dataset, ())
            return scan(self.sources[index], rules, self.catalogue, options, undecodable)

    def _refresh_conditions(self, name: str) -> Refreshed:
        with late_bar(self.report, f"scan {name}", "files") as told:
            options = ScanOptions(None, told, self.workers.should_stop, self.condition_sets[name].trusts_listing)
            return refresh(self.condition_sources[name], self._rules_of_conditions(name), self.catalogue, options)

    def _judge_conditions(self, name: str, found: Refreshed) -> ScanResult:
        rules = self._rules_of_conditions(name)
        options = ScanOptions(should_stop=self.workers.should_stop)
        return judge(self.condition_sources[name], rules, self.catalogue, found, options, undecodable=())

    def _rules_of_conditions(self, name: str) -> DatasetRules:
        return rules_of_conditions(self.condition_sets[name], self.datasets)

    def _conditions(self) -> list[Conditions | None]:
        """Those of each data set's images."""
        as_latents = reads_conditions(self.family) and self.family.condition_as_latents
        return [
            None if of is None else Conditions(self.condition_sources[of.id], of.resize_filter, as_latents)
            for of in (dataset.condition for dataset in self.datasets)
        ]

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

    # -- captions -------------------------------------------------------------------------------------------------------

    def encode_captions(self) -> None:
        if self.settings.live_text:
            self.text_caches: list[Cache] = []
            with self.family.text_encoders(self.settings.device) as encoders:
                self.text_fingerprint = f"trained from {encoders.fingerprint}"
            self.report.chapter("text", self._why_uncached())
            if cut_off := self._count_truncated():
                self.report.chapter("", cut_off_line(cut_off))
            return
        places = [texts_place(dataset, self.settings.cache_dir) for dataset in self.datasets]
        places.append(extra_texts_place(self.datasets, self.settings.text_cache_dir, self.settings.cache_dir))
        options = self.settings.fill_options(self.settings.text_batch_size, self.workers)
        self.extra_captions = sorted({"", *self.settings.extra_captions})
        with self.family.text_encoders(self.settings.device) as encoders:
            with self.workers.phase():
                self.text_caches = open_caches(places, lambda note: self.report.chapter("cache", note))
                marks = [cache.revision() for cache in self.text_caches]
                inputs = digest_of(self._inputs(), encoders.fingerprint, options.cache_dtype, marks)
                cached = self.memo.load_value("captions", inputs)  # how many of the data there are, all of them cached
                wanted = [list(self.catalogue.captions(dataset.id)) if cached is None else [] for dataset in self.datasets]
                wanted.append(self.extra_captions)
                filled = [
                    self._fill_captions(TextFiller(cache, encoders), captions, options)
                    for cache, captions in zip(self.text_caches, wanted, strict=True)
                ]
                self._fill_unconditional(encoders, options)
            self.text_fingerprint = encoders.fingerprint
            cut_off = sum(map(int, self.workers.gather(str(encoders.truncated))))
        if cached is None:
            cached = sum(map(len, wanted[:-1]))
            if self.workers.is_first:
                self.memo.save_value("captions", inputs, cached)
        needed = cached + len(self.extra_captions)
        self.report.chapter("text", gathered(filled, self.workers).describe(needed, "the text encoders"))
        if cut_off:
            self.report.chapter("", cut_off_line(cut_off))

    def _count_truncated(self) -> int:
        """Captions of the data that are longer than the text encoders read, by their tokenizers; in the first process."""
        lengths = self.family.caption_lengths()
        limit = lengths.limit
        if limit is None or not self.workers.is_first:
            return 0
        inputs = digest_of(self._inputs(), lengths.fingerprint)

        def count() -> int:
            captions = {caption for dataset in self.datasets for caption in self.catalogue.captions(dataset.id)}
            return sum(length > limit for length in lengths.token_counts(sorted(captions)))

        return self.memo.recall("truncated", inputs, count)

    def _why_uncached(self) -> str:
        entries = sorted({dataset.text_entry.id for dataset in self.datasets if dataset.text_entry is not None})
        unused = f"; text_embeds {', '.join(entries)} is not used" if entries else ""
        return f"the text encoders are trained: captions are encoded in every step, and none is cached{unused}"

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
        """Bring the report up to date with what encoding brought to light. Only the first process does anything."""
        if not self.workers.is_first:
            return
        failed = self.catalogue.failures()
        is_news = failed != self.told
        if is_news or self._count_unread() != self.unread:
            self._survey(failed)
        if is_news:
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
        caches: Sequence[Cache | None] = self.text_caches or [None] * (len(self.datasets) + 1)
        *texts, extra_texts = caches
        records = CachedRecords(
            images.passes,
            [
                PreparedDataset(cache, dataset.loss_weight, dataset.is_regularisation_data)
                for dataset, cache in zip(self.datasets, texts, strict=True)
            ],
            self.catalogue,
            recall,
            unconditional={} if extra_texts is None else recall.text(extra_texts, None, lambda: []),
            from_the_start=images.from_the_start,
            ahead=images.ahead(),
            are_remote=images.are_remote or any(cache.remote for cache in self.text_caches),
        )
        left_out = settings.undecodable
        if left_out is None:
            left_out = {dataset.id: self.catalogue.undecodable(dataset.id) for dataset in self.datasets}
        if len(self.datasets) > 1:
            self.report.chapter("mix", mix_summary(self.plan.datasets, images.steps.order.mix))
        return TrainingData(
            records,
            images.steps,
            BatchMaker(records, settings.seed, settings.caption_dropout, settings.encoders_apart),
            fingerprint=self._fingerprint(),
            undecodable=left_out,
            tell_of_failures=self.tell_of_failures,
            remove_passes=images.remove_passes,
            needed=images.new_steps,
            extra_texts=extra_texts,
            extra_captions=[] if extra_texts is None else self.extra_captions,
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
        if pairs := [(dataset.id, of) for dataset, of in zip(self.datasets, self._conditions(), strict=True) if of is not None]:
            fixed["conditions"] = ", ".join(f"{name} {conditions.fact}" for name, conditions in pairs)
        memo = self.memo if self.workers.is_first else None
        sources = {
            **dict(zip((dataset.id for dataset in self.datasets), self.sources, strict=True)),
            **self.condition_sources,
        }
        return DataFingerprint(self.plan, self.datasets, sources, self.catalogue, fixed, self._inputs, memo)


def _part_in_the_mix(dataset: DatasetConfig) -> str:
    asked = "by size" if dataset.probability is None else f"{dataset.probability:g}"
    return f"{dataset.id} {asked}{' without holding epochs open' if dataset.ignore_epochs else ''}"
