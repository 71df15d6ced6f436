"""Tables and files of captions and sizes: those that are asked for are described and there, and those described are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.config.datasets import DatasetConfig
from helpers.config.options.data import TABLES
from helpers.errors import quoted


def table_problems(dataset: DatasetConfig, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it). `entry` is the dataset as it stands in the file."""
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
            yield f"{key}.path", f"there is no file {quoted(path)}; name it from the dataset's folder, or from the root: /..."


def caption_file_problems(dataset: DatasetConfig, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) of caption files that cannot be read as the entry says."""
    if dataset.type in ("webdataset", "huggingface"):
        if dataset.caption_strategy == "json":
            yield "caption_strategy", f"json reads files beside images, and {dataset.type} has none; use textfile"
        if entry.get("caption_extensions") is not None:
            yield "caption_extensions", f"names files beside images, and {dataset.type} has none; remove it"
    folder = dataset.caption_folder
    if folder is not None and not os.path.isdir(folder):
        yield "caption_folder", f"there is no folder {quoted(folder)}; check the path"
    if folder is not None and dataset.instance_data_dir is not None and dataset.layout == "kohya":
        yield "caption_folder", 'cannot be used with "layout": "kohya"; put the captions beside the images'


def unused_caption_keys(dataset: DatasetConfig, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, why it does nothing)."""
    for key in ("caption_extensions", "caption_folder"):
        if entry.get(key) and not dataset.reads_caption_files and dataset.layout != "kohya":
            yield key, "captions are not read from files; set caption_strategy to textfile or json"
    if dataset.json is not None and dataset.caption_strategy != "json":
        yield "json", "caption_strategy is not json"


def unused_tables(dataset: DatasetConfig) -> Iterator[tuple[str, str]]:
    """(key, why it does nothing)."""
    for key in TABLES:
        if getattr(dataset, key) is not None and key not in dataset.tables_in_use:
            yield key, f"neither caption_strategy nor metadata_backend is {key}"
