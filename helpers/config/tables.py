"""Tables of captions and sizes: those that are asked for are described and there, and those described are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.config.datasets import DatasetConfig
from helpers.config.options.data import TABLES


def table_problems(dataset: DatasetConfig, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it). `entry` is the data set as it stands in the file."""
    wanted = {"caption_strategy": dataset.caption_table, "metadata_backend": dataset.metadata_backend}
    for setting, key in wanted.items():
        # A table that is described by a value of the wrong kind has been told already.
        if key in TABLES and getattr(dataset, key) is None and entry.get(key) is None:
            yield key, f'is missing; {setting} {key} needs it: {{"path": ...}}'
    if dataset.type != "local" or dataset.instance_data_dir is None:
        return
    for key, table in dataset.tables_in_use.items():
        path = dataset.instance_data_dir / Path(table.path).expanduser()  # an absolute path stays as it is
        if table.path and not os.path.isfile(path):
            yield f"{key}.path", f"there is no file {path}; name it from the data set's folder, or from the root: /..."


def unused_tables(dataset: DatasetConfig) -> Iterator[tuple[str, str]]:
    """(key, why it does nothing)."""
    for key in TABLES:
        if getattr(dataset, key) is not None and key not in dataset.tables_in_use:
            yield key, f"neither caption_strategy nor metadata_backend is {key}"
