"""Where a data set's files are: one opener for each `type` of the dataloader JSON."""

from __future__ import annotations

from collections.abc import Callable

from helpers.config.datasets import DatasetConfig
from helpers.storage.backend import SourceBackend
from helpers.storage.local import LocalSource


def open_source(dataset: DatasetConfig) -> SourceBackend:
    """The files of a data set, read-only. Nothing is listed or opened yet."""
    return _OPENERS[dataset.type](dataset)


def _local(dataset: DatasetConfig) -> SourceBackend:
    return LocalSource(dataset.instance_data_dir)


_OPENERS: dict[str, Callable[[DatasetConfig], SourceBackend]] = {
    "local": _local,
}
