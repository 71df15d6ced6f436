"""What a run would find in its caches if it started now: its data scanned anew, under the settings of its config.json."""

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
from helpers.data.base.sample import Sample
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import ScanOptions, refresh, scan
from helpers.data.encode.conditions import Conditions
from helpers.data.encode.latents import cuts, latents_facts, latents_key, latents_subject
from helpers.data.encode.texts import text_key, text_subject
from helpers.data.plan.buckets import BucketPlan, plan
from helpers.data.planning import columns_of, rules_of, rules_of_conditions
from helpers.data.ports import reads_conditions
from helpers.data.sources import CachePlace, extra_texts_place, latents_place, open_source, pass_prefix, texts_place
from helpers.errors import DataError
from helpers.families import FAMILIES
from helpers.setup.validation import captions_to_encode

if TYPE_CHECKING:
    from helpers.protocols import ModelFamily

CATALOGUE = "catalogue.sqlite"


@dataclass(frozen=True)
class Picture:
    """A picture of a data set as it is now, and what its latents have to be made of."""

    sample: Sample
    left_out: str  # why it is not trained on; "" when it is
    cache: CachePlace
    facts: dict[str, str]  # empty when it is left out
    epoch: int | None = None  # whose cut this is, where each epoch has cuts of its own

    @property
    def key(self) -> bytes:
        return latents_key(self.facts)

    @property
    def subject(self) -> str:
        return latents_subject(self.sample)


@dataclass(frozen=True)
class Present:
    """A run as it would start now."""

    config: Config
    family: ModelFamily
    catalogue: Catalogue
    plan: BucketPlan
    image_fingerprint: str
    text_fingerprint: str

    def require_caches_here(self) -> None:
        """DataError where a cache is in a bucket, which other machines may be using and from which nothing is ever deleted."""
        for dataset in self.config.datasets:
            for place in (latents_place(dataset, self.config.cache.cache_dir), texts_place(dataset, self.config.cache.cache_dir)):
                if place.bucket is not None:
                    raise DataError(f"data set {dataset.id!r} has a cache in a bucket, and nothing is ever deleted from a bucket.")

    def needed(self) -> dict[Path, dict[bytes, str]]:
        """By cache folder: the keys of all records that the run reads, each with the subject that its facts are kept under.

        A picture whose bytes the catalogue does not know, since it is new there, is read: its latents may be there for another's sake.
        Latents of single epochs are not counted: they come and go with the epochs.
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
        named = zip(images, self.catalogue.keys(dataset.id), self.catalogue.contents(dataset.id), cuts(self.plan, rows), strict=True)
        precision, conditions = self.config.cache.cache_dtype, self._conditions(dataset)
        for image, key, known, cut in named:
            facts = latents_facts(known or self._content(image), cut, self.image_fingerprint, precision, conditions)
            yield latents_key(facts), f"{dataset.id}/{key}"

    def pictures(self, name: str) -> list[Picture]:
        """What a path, a key of a data set or `id/key` names, in every data set that has it. DataError where none has."""
        found = [
            self._picture(index, *row, key)
            for index, dataset in enumerate(self.config.datasets)
            for key in dict.fromkeys(self._keys(dataset.id, dataset.instance_data_dir, name))
            if (row := self._row(dataset.id, key)) is not None
        ]
        if not found:
            sets = ", ".join(dataset.id for dataset in self.config.datasets)
            raise DataError(f"{name} is no file of the run's data sets ({sets}); name a picture by its path, or as DATASET/FILE.")
        return found

    @staticmethod
    def _keys(dataset: str, root: Path | None, name: str) -> Iterator[str]:
        yield name
        if name.startswith(f"{dataset}/"):
            yield name.removeprefix(f"{dataset}/")
        if root is not None and Path(name).absolute().is_relative_to(root.absolute()):
            yield Path(name).absolute().relative_to(root.absolute()).as_posix()

    def _row(self, dataset: str, key: str) -> tuple[int, str | None] | None:
        """The catalogue's row of a file, and why it cannot or may not be trained on."""
        with self.catalogue.transaction() as database:
            query = "SELECT id, kind, coalesce(left_out, undecodable) FROM files WHERE dataset = ? AND key = ?"
            found = database.execute(query, (dataset, key)).fetchone()
        if found is None:
            return None
        row, kind, reason = found
        return row, reason if kind == "image" or reason else "it is the caption of a picture, not a picture"

    def _picture(self, index: int, row: int, reason: str | None, key: str) -> Picture:
        dataset = self.config.datasets[index]
        sample, cache = self.catalogue.sample(row), latents_place(dataset, self.config.cache.cache_dir)
        if reason:
            return Picture(sample, reason, cache, {})
        epoch, cut_by = None, self.plan
        if dataset.vae_cache_clear_each_epoch:
            epoch, cache = self._present_pass(cache)
            cut_by = plan([columns_of(of, self.catalogue, self.config.run.seed, epoch) for of in self.config.datasets])
        planned = ((cut_by.columns["dataset"] == index) & (cut_by.columns["row"] == row)).nonzero()[0]
        precision, conditions = self.config.cache.cache_dtype, self._conditions(dataset)
        facts = latents_facts(self._content(row), cuts(cut_by, planned)[0], self.image_fingerprint, precision, conditions)
        return Picture(sample, "", cache, facts, epoch)

    def _present_pass(self, cache: CachePlace) -> tuple[int, CachePlace]:
        """The epoch that the run is in or ended with, and where its latents are. The next one may be there too, in part."""
        prefix = pass_prefix(self.config.run.output_dir, self.config.run.seed)
        epoch = min((int(found.name.removeprefix(prefix)) for found in cache.folder.glob(f"{prefix}*")), default=0)
        return epoch, CachePlace(cache.folder / f"{prefix}{epoch}")

    def _conditions(self, dataset: DatasetConfig) -> Conditions | None:
        of = dataset.condition
        if of is None:
            return None
        return Conditions(open_source(of), of.resize_filter, reads_conditions(self.family) and self.family.condition_as_latents)

    def _content(self, image: int) -> str:
        """What `Catalogue.content` says of an image whose files have been read, from the files as they are now."""
        sources = {of.id: of for of in (*self.config.datasets, *self.config.conditioning)}
        paired = self.catalogue.condition(image)
        samples = [self.catalogue.sample(image), *([paired] if paired is not None else [])]
        return " ".join(hashlib.sha256(open_source(sources[of.dataset]).read(of.key)).hexdigest() for of in samples)


@contextmanager
def present(output_dir: Path, progress: Callable[[int, int], None]) -> Iterator[Present]:
    """The run of an OUTPUT_DIR as it would start now. Its own catalogue is read and left as it is: the scan goes into a copy.

    ConfigError, ModelError or DataError where the run could not start. `progress` is told of files that had to be opened, and of how many.
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
            for conditions in config.conditioning:
                refresh(open_source(conditions), rules_of_conditions(conditions, config.datasets), catalogue, options)
            for dataset in config.datasets:
                scan(open_source(dataset), rules_of(dataset, config.run.seed), catalogue, options, undecodable=())
            planned = plan([columns_of(dataset, catalogue, config.run.seed) for dataset in config.datasets])
            yield Present(config, family, catalogue, planned, image_fingerprint, text_fingerprint)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise DataError(f"{source} is missing: the run has not looked at its data yet, or its cache was removed.")
    try:
        original, copy = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=60), sqlite3.connect(target)
        try:
            original.backup(copy)
        finally:
            original.close()
            copy.close()
    except sqlite3.Error as error:
        raise DataError(f"{source} cannot be read ({error}).") from error
