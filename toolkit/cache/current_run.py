"""A run as it would start now, with the settings in its config.json: scans the data again and says which cache records it needs."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.datasets import DatasetConfig
from helpers.config.saved import read_saved_config
from helpers.data.base.sample import ROLES, Sample
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import ScanOptions, refresh, scan
from helpers.data.encode.companions import companions_of
from helpers.data.encode.keys import crops, latents_facts, latents_key, latents_subject, text_key, text_subject
from helpers.data.plan.buckets import BucketPlan, plan
from helpers.data.planning import columns_of, companions_of_all, rules_of, rules_of_companions
from helpers.data.sources import CachePlace, epoch_prefix, extra_texts_place, latents_place, open_source, texts_place
from helpers.errors import DataError
from helpers.families import FAMILIES
from helpers.setup.validation import captions_to_encode

if TYPE_CHECKING:
    from helpers.protocols import ModelFamily

CATALOGUE = "catalogue.sqlite"


@dataclass(frozen=True)
class ImageEntry:
    """An image of a dataset as it is now, and what its latents must be made from."""

    sample: Sample
    left_out: str  # the reason why it is left out; "" if it is used
    cache: CachePlace
    facts: dict[str, str]  # empty if it is left out
    epoch: int | None = None  # the epoch of this crop, for datasets with new crops in each epoch

    @property
    def key(self) -> bytes:
        return latents_key(self.facts)

    @property
    def subject(self) -> str:
        return latents_subject(self.sample)


@dataclass(frozen=True)
class CurrentRun:
    """A run as it would start now."""

    config: Config
    family: ModelFamily
    catalogue: Catalogue
    plan: BucketPlan
    image_fingerprint: str
    text_fingerprint: str

    def require_local_caches(self) -> None:
        """DataError if a cache is in a bucket: other machines may use it, and nothing is ever deleted from a bucket."""
        for dataset in self.config.datasets:
            for place in (latents_place(dataset, self.config.cache.cache_dir), texts_place(dataset, self.config.cache.cache_dir)):
                if place.bucket is not None:
                    raise DataError(f"dataset {dataset.id!r} has a cache in a bucket, and nothing is ever deleted from a bucket.")

    def needed(self) -> dict[Path, dict[bytes, str]]:
        """The keys of all records that the run reads, by cache folder. Each key has the subject under which its facts are stored.

        An image that is new in the catalogue is read to compute its hash, because an identical image may already have latents. Latents of
        single epochs are not included: the run deletes them itself.
        """
        config = self.config
        needed: dict[Path, dict[bytes, str]] = {}
        precision = config.cache.cache_dtype
        for index, dataset in enumerate(config.datasets):
            latents = needed.setdefault(latents_place(dataset, config.cache.cache_dir).folder, {})
            if not dataset.vae_cache_clear_each_epoch:
                latents.update(self._needed_latents(index, dataset))
            texts = needed.setdefault(texts_place(dataset, config.cache.cache_dir).folder, {})
            for caption in self.catalogue.captions(dataset.id):
                texts[text_key(caption, self.text_fingerprint, precision)] = text_subject(caption)
        extras = extra_texts_place(config.datasets, config.cache.cache_dir_text, config.cache.cache_dir)
        texts = needed.setdefault(extras.folder, {})
        for extra in (None, "", *captions_to_encode(config, self.family)):
            texts[text_key(extra, self.text_fingerprint, precision)] = text_subject(extra)
        return needed

    def _needed_latents(self, index: int, dataset: DatasetConfig) -> Iterator[tuple[bytes, str]]:
        rows = (self.plan.columns["dataset"] == index).nonzero()[0]
        images = self.plan.columns["row"][rows].tolist()
        named = zip(images, self.catalogue.keys(dataset.id), self.catalogue.contents(dataset.id), crops(self.plan, rows), strict=True)
        precision, companions = self.config.cache.cache_dtype, companions_of(dataset, self.family)
        for image, key, known, crop in named:
            facts = latents_facts(known or self._content(image), crop, self.image_fingerprint, precision, companions)
            yield latents_key(facts), f"{dataset.id}/{key}"

    def images(self, name: str) -> list[ImageEntry]:
        """The images named by a path, a key or `DATASET/KEY`, from every dataset that has it. DataError if none has."""
        found = [
            self._image(index, *row, key)
            for index, dataset in enumerate(self.config.datasets)
            for key in dict.fromkeys(self._keys(dataset.id, dataset.instance_data_dir, name))
            if (row := self._row(dataset.id, key)) is not None
        ]
        if not found:
            sets = ", ".join(dataset.id for dataset in self.config.datasets)
            raise DataError(f"{name} is not a file of the run's datasets ({sets}); name an image by its path, or as DATASET/FILE.")
        return found

    @staticmethod
    def _keys(dataset: str, root: Path | None, name: str) -> Iterator[str]:
        yield name
        if name.startswith(f"{dataset}/"):
            yield name.removeprefix(f"{dataset}/")
        if root is not None and Path(name).absolute().is_relative_to(root.absolute()):
            yield Path(name).absolute().relative_to(root.absolute()).as_posix()

    def _row(self, dataset: str, key: str) -> tuple[int, str | None] | None:
        """A file's row in the catalogue, and the reason why it is left out (None if it is used). None if there is no such file."""
        with self.catalogue.transaction() as database:
            query = "SELECT id, kind, coalesce(left_out, undecodable) FROM files WHERE dataset = ? AND key = ?"
            found = database.execute(query, (dataset, key)).fetchone()
        if found is None:
            return None
        row, kind, reason = found
        return row, reason if kind == "image" or reason else "it is the caption of an image, not an image"

    def _image(self, index: int, row: int, reason: str | None, key: str) -> ImageEntry:
        dataset = self.config.datasets[index]
        sample, cache = self.catalogue.sample(row), latents_place(dataset, self.config.cache.cache_dir)
        if reason:
            return ImageEntry(sample, reason, cache, {})
        epoch, cropped_by = None, self.plan
        if dataset.vae_cache_clear_each_epoch:
            epoch, cache = self._current_epoch(cache)
            cropped_by = plan([columns_of(of, self.catalogue, self.config.run.seed, epoch) for of in self.config.datasets])
        planned = ((cropped_by.columns["dataset"] == index) & (cropped_by.columns["row"] == row)).nonzero()[0]
        precision, companions = self.config.cache.cache_dtype, companions_of(dataset, self.family)
        facts = latents_facts(self._content(row), crops(cropped_by, planned)[0], self.image_fingerprint, precision, companions)
        return ImageEntry(sample, "", cache, facts, epoch)

    def _current_epoch(self, cache: CachePlace) -> tuple[int, CachePlace]:
        """The epoch in which the run is or ended, and the folder of its latents. Latents of the next epoch may exist too."""
        prefix = epoch_prefix(self.config.run.output_dir, self.config.run.seed)
        epoch = min((int(found.name.removeprefix(prefix)) for found in cache.folder.glob(f"{prefix}*")), default=0)
        return epoch, CachePlace(cache.folder / f"{prefix}{epoch}")

    def _content(self, image: int) -> str:
        """The value of `Catalogue.content` for an image, computed from its files as they are now."""
        sources = {of.id: of for of in self.config.datasets} | companions_of_all(self.config.datasets)
        companions = [paired for role in ROLES if (paired := self.catalogue.companion(image, role)) is not None]
        samples = [self.catalogue.sample(image), *companions]
        return " ".join(hashlib.sha256(open_source(sources[of.dataset]).read(of.key)).hexdigest() for of in samples)


@contextmanager
def open_run(output_dir: Path, progress: Callable[[int, int], None]) -> Iterator[CurrentRun]:
    """The run of an OUTPUT_DIR as it would start now. The scan uses a copy of the run's catalogue, which is not changed.

    ConfigError, ModelError or DataError if the run could not start. `progress` gets the number of opened files, and of files to open.
    """
    config = read_saved_config(output_dir, known_axes())
    family = FAMILIES[config.family_name](config.model, config.cache)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    with family.image_codec(device) as codec, family.text_encoders(device) as encoders:
        image_fingerprint, text_fingerprint = codec.fingerprint, encoders.fingerprint  # known without loading either
    with tempfile.TemporaryDirectory(prefix="simpletuner-cache-") as folder:
        copy = Path(folder) / CATALOGUE
        _copy(config.cache.cache_dir / CATALOGUE, copy)
        options = ScanOptions(on_progress=progress)
        with Catalogue(copy) as catalogue:
            for companions in companions_of_all(config.datasets).values():
                refresh(open_source(companions), rules_of_companions(companions, config.datasets), catalogue, options)
            for dataset in config.datasets:
                scan(open_source(dataset), rules_of(dataset, config.run.seed), catalogue, options, undecodable=())
            planned = plan([columns_of(dataset, catalogue, config.run.seed) for dataset in config.datasets])
            yield CurrentRun(config, family, catalogue, planned, image_fingerprint, text_fingerprint)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise DataError(f"{source} is missing: the run has not scanned its data yet, or its cache was deleted.")
    try:
        original, copy = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=60), sqlite3.connect(target)
        try:
            original.backup(copy)
        finally:
            original.close()
            copy.close()
    except sqlite3.Error as error:
        raise DataError(f"{source} cannot be read ({error}).") from error
