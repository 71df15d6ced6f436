"""From data sets to training data: scan, plan, report, encode what is missing, let the encoders go.

Nothing here depends on what an earlier run did, only on what is on disk: a second start finds everything there, opens no image and
loads no encoder. The first process scans and plans, the others read its plan; all of them encode, each its share.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig
from helpers.data.batches import BatchMaker
from helpers.data.buckets import BucketPlan, plan
from helpers.data.cache import LOCATION, Cache, Locations
from helpers.data.catalogue import Catalogue
from helpers.data.fill import Filled, FillOptions, available_threads
from helpers.data.latents import LatentFiller
from helpers.data.order import EpochOrder
from helpers.data.planning import columns_of, load_plan, restricted, rules_of, save_plan
from helpers.data.report import REPORT, Memory, Survey, caption_report, dataset_report, summary
from helpers.data.scan import ScanResult, scan
from helpers.data.sources import open_source
from helpers.data.texts import TextFiller, text_key
from helpers.data.thumbnails import thumbnails
from helpers.data.training_data import CachedRecords, PreparedDataset, Recall, TrainingData
from helpers.data.workers import Workers
from helpers.errors import DataError
from helpers.storage.atomic import write_json

if TYPE_CHECKING:
    from helpers.protocols import ModelFamily, Reporter, TextEncoders


@dataclass(frozen=True)
class DataSettings:
    """What the preparation of data needs to know besides the data sets."""

    output_dir: Path  # dataset_report.json goes here
    cache_dir: Path  # the catalogue, the plan and what reports remember go here
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
    resumed: bool = False  # then the plan stays that of the run's first life: with the images that turned out undecodable in it


def prepare_data(
    datasets: Sequence[DatasetConfig], settings: DataSettings, family: ModelFamily, workers: Workers, report: Reporter
) -> TrainingData:
    """Everything on disk that training needs, and the way to it.

    The family's encoders must know their fingerprint without loading weights, so that a start that lacks nothing loads none.
    DataError where training cannot start from what is there, StorageError where a store fails, Interrupted, after keeping what has
    been encoded, when the user asked to stop.
    """
    preparation = _Preparation(datasets, settings, family, workers, report)
    preparation.scan_and_plan()
    preparation.encode_images()
    preparation.encode_captions()
    preparation.account_for_failures()
    return preparation.training_data()


def survey_data(datasets: Sequence[DatasetConfig], settings: DataSettings, family: ModelFamily, workers: Workers, report: Reporter) -> None:
    """Scan, plan and report as `prepare_data` does, and encode nothing. Raises the same errors."""
    _Preparation(datasets, settings, family, workers, report).scan_and_plan()


class _Preparation:
    """The steps of `prepare_data`, in order; each leaves here what the next ones need."""

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
        self.unread = 0  # images whose bytes were not known when the data was last surveyed; in the first process
        self.images = Filled()  # what encoding images came to in all processes
        self.encoder_fingerprints: dict[str, str] = {}

    # -- scan and plan --------------------------------------------------------------------------------------------------

    def scan_and_plan(self) -> None:
        plan_folder = self.settings.cache_dir / "plan"
        catalogue_file = self.settings.cache_dir / "catalogue.sqlite"
        with self.workers.phase():
            if self.workers.is_first:
                self.catalogue = Catalogue(catalogue_file)
                self.scanned = [self._scan(index) for index in range(len(self.datasets))]
                columns = [columns_of(dataset, self.catalogue, self.settings.seed) for dataset in self.datasets]
                save_plan(plan(columns), plan_folder)
        if not self.workers.is_first:
            self.catalogue = Catalogue(catalogue_file)
        self.plan = load_plan(plan_folder)
        with self.workers.phase():
            if self.workers.is_first:
                self._survey(dataset_report(self.scanned, self.plan, self.catalogue), self.plan)
                for index, result in enumerate(self.scanned):
                    shapes = np.unique(self.plan.columns["shape"][self.plan.columns["dataset"] == index])
                    self.report.chapter("dataset", summary(result, len(shapes)))

    def _survey(self, told: dict[str, Any], plan: BucketPlan) -> None:
        """Write and tell what is known of the data: once when it is planned, and again when encoding has told more."""
        folder = self.settings.cache_dir / "report"
        lengths, tokens = self.family.caption_lengths(), Memory(folder / "tokens.json")
        for entry in told["datasets"]:
            entry["captions"] = caption_report(entry["id"], self.catalogue, lengths, tokens)
        tokens.save()
        self.unread = sum(entry["unread"] for entry in told["datasets"])
        write_json(self.settings.output_dir / REPORT, told)
        pictures = Memory(folder / "thumbnails.json")
        self.report.surveyed(Survey(told, lambda: thumbnails(plan, self.sources, self.catalogue, pictures, self.settings.threads)))

    def _scan(self, index: int) -> ScanResult:
        rules = rules_of(self.datasets[index])
        with _late_bar(self.report, f"scan {rules.dataset}", "files") as told:
            return scan(
                self.sources[index],
                rules,
                self.catalogue,
                on_progress=told,
                should_stop=self.workers.should_stop,
                leave_out_undecodable=not self.settings.resumed,
            )

    # -- images ---------------------------------------------------------------------------------------------------------

    def encode_images(self) -> None:
        options = self._options(self.settings.vae_batch_size)
        self.locations: Locations = np.zeros(len(self.plan), dtype=LOCATION)
        with self.family.image_codec(self.settings.device) as codec:
            with self.workers.phase():
                self.latent_caches = _open_caches([dataset.cache_dir_vae for dataset in self.datasets], self.report)
                fillers = [
                    LatentFiller(self.plan, index, self.sources[index], self.catalogue, cache, codec)
                    for index, cache in enumerate(self.latent_caches)
                ]
                self._locate(fillers)
                filled = [self._fill_images(filler, options) for filler in fillers]
            self.images = self._all(filled)
            if not self.locations["shard"].all():
                # Not only what was encoded: an image whose bytes were known under another name is found once it was read.
                self._locate(fillers)
            self.encoder_fingerprints["image_codec"] = f"{codec.fingerprint} {options.cache_dtype}"
        self.report.chapter("latents", self.images.describe(len(self.plan), "the VAE"))
        self._refuse_without_images()

    def _locate(self, fillers: Iterable[LatentFiller]) -> None:
        for filler in fillers:
            self.locations[filler.rows] = filler.locate(self.settings.cache_dtype)

    def _fill_images(self, filler: LatentFiller, options: FillOptions) -> Filled:
        pending = filler.pending(self.locations, options)
        if not pending:
            return Filled()
        with _bar(self.report, f"encode {filler.name}", sum(map(len, pending)), "images") as progress:
            return filler.encode(pending, dataclasses.replace(options, progress=progress))

    def _refuse_without_images(self) -> None:
        for index, dataset in enumerate(self.datasets):
            rows = self.plan.columns["dataset"] == index
            if not (self.locations["shard"][rows] != 0).any():
                row = int(self.plan.columns["row"][np.flatnonzero(rows)[0]])
                reason = self.images.failed.get(row, "its latents are missing")
                raise DataError(
                    f"data set {dataset.id!r}: none of its {int(rows.sum()):,} images in {self.sources[index].name} could be encoded;"
                    f" {self.catalogue.sample(row).key}: {reason}."
                )

    # -- captions -------------------------------------------------------------------------------------------------------

    def encode_captions(self) -> None:
        folders = [*(dataset.text_cache_dir for dataset in self.datasets), self.settings.text_cache_dir]
        options = self._options(self.settings.text_batch_size)
        wanted = [list(self.catalogue.captions(dataset.id)) for dataset in self.datasets]
        wanted.append(sorted({"", *self.settings.extra_captions}))
        with self.family.text_encoders(self.settings.device) as encoders:
            with self.workers.phase():
                self.text_caches = _open_caches(folders, self.report)
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

    def _fill_captions(self, filler: TextFiller, captions: Sequence[str], options: FillOptions) -> Filled:
        pending = filler.pending(captions, options)
        if not pending:
            return Filled()
        with _bar(self.report, "encode captions", sum(map(len, pending)), "captions") as progress:
            return filler.encode(pending, dataclasses.replace(options, progress=progress))

    def _fill_unconditional(self, encoders: TextEncoders, options: FillOptions) -> None:
        cache = self.text_caches[-1]
        key = text_key(None, encoders.fingerprint, options.cache_dtype)
        if self.workers.is_first and not cache.find([key])["shard"][0]:
            TextFiller(cache, encoders).keep(None, self.family.unconditional(encoders), options)

    # -- the end ----------------------------------------------------------------------------------------------------------

    def account_for_failures(self) -> None:
        """Tell the report what encoding brought to light, and the catalogue of images that never can be encoded.

        The next scan leaves those out. It is told only now that all are encoded: a smaller plan would cut other batches for the
        encoder, and an interrupted caching that goes on would give other last bits than an undisturbed one.
        """
        failed = self.images.failed
        with self.workers.phase():
            if self.workers.is_first and (failed or self.unread):
                for row in self.images.undecodable:
                    self.catalogue.set_undecodable(row, failed[row])
                self._survey_again(failed)

    def _survey_again(self, failed: Mapping[int, str]) -> None:
        samples = [self.catalogue.sample(row) for row in failed]
        left_out = [
            (sample.dataset, {"key": sample.key, "reason": reason}) for sample, reason in zip(samples, failed.values(), strict=True)
        ]
        results = []
        for result in self.scanned:
            lost = sum(dataset == result.dataset for dataset, _ in left_out)
            results.append(dataclasses.replace(result, used=result.used - lost, left_out=result.left_out + lost))
        trained = restricted(self.plan, self.usable)
        told = dataset_report(results, trained, self.catalogue)
        for entry in told["datasets"]:
            entry["left_out"] += [item for dataset, item in left_out if dataset == entry["id"]]
            entry["left_out"].sort(key=lambda item: item["key"])
        self._survey(told, trained)
        if failed:
            kinds = Counter(reason.partition(":")[0] for reason in failed.values())
            counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
            self.report.chapter("dataset", f"{len(failed):,} more left out, found while encoding ({counts}); {REPORT} names them")

    def training_data(self) -> TrainingData:
        settings, workers = self.settings, self.workers
        recall = Recall(
            self.family,
            settings.device,
            self.text_fingerprint,
            dataclasses.replace(self._options(settings.vae_batch_size), world_size=1, should_stop=lambda: False),
            dataclasses.replace(self._options(settings.text_batch_size), world_size=1, should_stop=lambda: False),
        )
        records = CachedRecords(
            self.plan,
            self.usable,
            self.locations,
            [
                PreparedDataset(source, latents, texts, dataset.loss_weight)
                for dataset, source, latents, texts in zip(
                    self.datasets, self.sources, self.latent_caches, self.text_caches[:-1], strict=True
                )
            ],
            self.catalogue,
            recall,
            unconditional=recall.text(self.text_caches[-1], None, lambda: []),
        )
        trained = restricted(self.plan, self.usable)
        repeats = np.array([dataset.repeats for dataset in self.datasets])[trained.columns["dataset"]]
        return TrainingData(
            records,
            EpochOrder(trained.columns["shape"], repeats, settings.batch_size, settings.seed),
            BatchMaker(records, settings.seed, settings.caption_dropout),
            accumulation=settings.accumulation,
            rank=workers.rank,
            world_size=workers.world_size,
            fingerprint=self._fingerprint(trained),
            extra_texts=self.text_caches[-1],
            extra_captions=self.extra_captions,
        )

    def _fingerprint(self, trained: BucketPlan) -> dict[str, str]:
        usable = np.zeros(len(self.plan), dtype=bool)
        usable[self.usable] = True
        images, captions = hashlib.sha256(), hashlib.sha256()
        for index, dataset in enumerate(self.datasets):
            facts = zip(
                usable[self.plan.columns["dataset"] == index],
                self.catalogue.keys(dataset.id),
                self.catalogue.contents(dataset.id),
                self.catalogue.captions_by_image(dataset.id),
                strict=True,
            )
            for used, key, content, caption in facts:
                if used:
                    images.update(f"{key}\0{content}\0".encode())
                    captions.update(f"{caption}\0".encode())
        return {
            "plan": trained.fingerprint(),
            "images": images.hexdigest(),
            "captions": captions.hexdigest(),
            "repeats": ", ".join(f"{dataset.id} {dataset.repeats}" for dataset in self.datasets),
            "batch_size": str(self.settings.batch_size),
            **self.encoder_fingerprints,
        }

    @property
    def usable(self) -> NDArray[np.int64]:
        """Rows of the plan whose latents are there."""
        return np.flatnonzero(self.locations["shard"] != 0)

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


def _open_caches(folders: Iterable[Path], report: Reporter) -> list[Cache]:
    """A cache for each folder; the same one where folders are the same."""
    caches: dict[Path, Cache] = {}
    opened = []
    for folder in folders:
        place = folder.absolute()
        if place not in caches:
            caches[place] = Cache(place)
            for note in caches[place].notes:
                report.chapter("cache", note)
        opened.append(caches[place])
    return opened


@contextmanager
def _bar(report: Reporter, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    bar = report.progress(title, total, unit)
    if bar is None:
        yield lambda done: None
        return
    with bar as advance:
        yield advance


@contextmanager
def _late_bar(report: Reporter, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that tells (done, total); shown when it is first told of, so that a warm start shows none."""
    with ExitStack() as shown:
        advance: Callable[[int], None] | None = None
        done_before = 0

        def told(done: int, total: int) -> None:
            nonlocal advance, done_before
            if advance is None:
                advance = shown.enter_context(_bar(report, title, total, unit))
            advance(done - done_before)
            done_before = done

        yield told
