"""Where a data set's files are: one opener for each `type` of the dataloader JSON."""

from __future__ import annotations

from collections.abc import Callable

from helpers.config.datasets import DatasetConfig
from helpers.data.images import EXTENSIONS
from helpers.storage.backend import SourceBackend
from helpers.storage.huggingface import HuggingFaceSource
from helpers.storage.local import LocalSource
from helpers.storage.webdataset import WebDataset


def open_source(dataset: DatasetConfig) -> SourceBackend:
    """The files of a data set, read-only. Nothing is listed or opened yet."""
    return _OPENERS[dataset.type](dataset)


def _local(dataset: DatasetConfig) -> SourceBackend:
    return LocalSource(dataset.instance_data_dir)


def _huggingface(dataset: DatasetConfig) -> SourceBackend:
    captions = dataset.caption_strategy == "textfile" and not dataset.only_instance_prompt
    return HuggingFaceSource(str(dataset.path), dataset.split, dataset.image_column, dataset.caption_column, captions)


def _webdataset(dataset: DatasetConfig) -> SourceBackend:
    return WebDataset(dataset.shards, EXTENSIONS, dataset.index_dir)


_OPENERS: dict[str, Callable[[DatasetConfig], SourceBackend]] = {
    "local": _local,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
}
