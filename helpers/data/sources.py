"""Where the files and the caches of a dataset are: one opener for each `type` of the dataloader JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.config.datasets import DatasetConfig, Entry
from helpers.data.base.images import EXTENSIONS
from helpers.data.cache.cache import Cache, record_key
from helpers.data.cache.remote import RemoteShards
from helpers.storage.backend import SourceBackend
from helpers.storage.huggingface import HuggingFaceSource
from helpers.storage.local import LocalSource
from helpers.storage.s3_address import S3Address
from helpers.storage.two_folders import WithCaptionFolder
from helpers.storage.webdataset import WebDataset

if TYPE_CHECKING:
    from helpers.data.ports import DataReporter


def open_source(dataset: DatasetConfig) -> SourceBackend:
    """The files of a dataset, read-only. Lists and opens nothing."""
    return _OPENERS[dataset.type](dataset)


def _local(dataset: DatasetConfig) -> SourceBackend:
    if dataset.caption_folder is not None and dataset.reads_caption_files:
        return WithCaptionFolder(dataset.instance_data_dir, dataset.caption_folder, dataset.caption_endings)
    return LocalSource(dataset.instance_data_dir)


def _huggingface(dataset: DatasetConfig) -> SourceBackend:
    captions = dataset.caption_strategy == "textfile" and not dataset.only_instance_prompt
    return HuggingFaceSource(str(dataset.path), dataset.split, dataset.image_column, dataset.caption_column, captions)


def _webdataset(dataset: DatasetConfig) -> SourceBackend:
    return WebDataset(dataset.shards, EXTENSIONS, dataset.index_dir)


def _aws(dataset: DatasetConfig) -> SourceBackend:
    from helpers.storage.s3 import S3Source  # imports boto3: a quarter of a second that local datasets need not wait

    return S3Source(_address(dataset, dataset.aws_data_prefix or ""))


_OPENERS: dict[str, Callable[[DatasetConfig], SourceBackend]] = {
    "local": _local,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
    "aws": _aws,
}


@dataclass(frozen=True)
class CachePlace:
    """Where a cache is: a folder, or a bucket with the index and copies of some shards in the folder."""

    folder: Path
    bucket: S3Address | None = None
    limit_bytes: int | None = None  # of the copies

    def open(self) -> Cache:
        """Raises StorageError, or DataError if the settings of the bucket are wrong."""
        if self.bucket is None:
            return Cache(self.folder)
        from helpers.storage.s3 import S3Backend

        return Cache(self.folder, RemoteShards(S3Backend(self.bucket), self.folder, self.limit_bytes))

    def store(self) -> SourceBackend | None:
        """The bucket, read-only; None for a cache in a folder."""
        if self.bucket is None:
            return None
        from helpers.storage.s3 import S3Source

        return S3Source(self.bucket)


def open_caches(places: Iterable[CachePlace], report: DataReporter) -> list[Cache]:
    """A cache for each place, the same object where places are the same. Reports what was wrong with a cache and has been mended."""
    caches: dict[Path, Cache] = {}
    opened = []
    for place in places:
        if place.folder not in caches:
            caches[place.folder] = place.open()
            for note in caches[place.folder].notes:
                report.chapter("cache", note)
        opened.append(caches[place.folder])
    return opened


def latents_place(dataset: DatasetConfig, cache_dir: Path) -> CachePlace:
    """The cache of a dataset's latents; `cache_dir` is the run's."""
    if dataset.latents_prefix:
        return _in_bucket(dataset, dataset.latents_prefix, cache_dir)
    return CachePlace(dataset.cache_dir_vae.absolute())


def epoch_prefix(output_dir: Path, seed: int) -> str:
    """How the names of the folders start that hold the latents of single epochs of a run; the number of the epoch follows.

    They are in the folder of the latents that serve every epoch, which other runs may share.
    """
    return f"epoch-{record_key(str(output_dir.absolute()), str(seed)).hex()[:12]}-"


def texts_place(dataset: DatasetConfig, cache_dir: Path) -> CachePlace:
    """The cache of the text tensors of a dataset's captions; `cache_dir` is the run's."""
    entry = dataset.text_entry
    if entry is not None:
        return _in_bucket(entry, entry.aws_data_prefix or "", cache_dir)
    return CachePlace(dataset.text_cache_dir.absolute())


def extra_texts_place(datasets: Iterable[DatasetConfig], text_cache_dir: Path, cache_dir: Path) -> CachePlace:
    """The cache of captions that belong to no dataset, such as validation prompts; the folders are the run's.

    If the default cache of captions is in a bucket, it is that one: else another machine would have to encode them again.
    """
    by_default = (dataset for dataset in datasets if dataset.text_entry is not None and dataset.text_entry.default)
    dataset = next(by_default, None)
    return CachePlace(text_cache_dir.absolute()) if dataset is None else texts_place(dataset, cache_dir)


def _in_bucket(entry: Entry, prefix: str, cache_dir: Path) -> CachePlace:
    address = _address(entry, prefix)
    # Caches may share a cache_local_dir, so each has a folder of its own in it.
    own = f"{address.bucket}-{record_key(address.bucket, address.folder, address.endpoint or '').hex()[:12]}"
    limit = entry.cache_local_limit_gb
    folder = (entry.cache_local_dir or cache_dir / "s3").absolute() / own
    return CachePlace(folder, address, None if limit is None else int(limit * 1e9))


def _address(entry: Entry, prefix: str) -> S3Address:
    return S3Address(
        bucket=entry.aws_bucket_name or "",
        prefix=prefix,
        endpoint=entry.aws_endpoint_url or None,
        region=entry.aws_region_name or None,
        access_key=entry.aws_access_key_id or None,
        secret_key=entry.aws_secret_access_key or None,
    )
