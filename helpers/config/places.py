"""Where the images of a dataset are, for each `type`: checked as far as that needs no library, with patterns expanded."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.config.datasets import DatasetConfig, TextCacheConfig
from helpers.config.libraries import lacking
from helpers.config.shards import expanded, shard_problems
from helpers.errors import quoted

CAPTIONED_TYPES = ("huggingface", "webdataset")  # whose captions come with the images, unless the entry says otherwise

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Problems = list[tuple[str, str]]  # (key, the rest of a sentence about it)


def placed(dataset: DatasetConfig, entry: Mapping[str, Any], base: Path | None) -> tuple[DatasetConfig, Problems]:
    """A dataset with its place settled, and what is wrong with it. Relative paths are taken from `base`."""
    if dataset.type == "huggingface":
        return _library_rows(dataset, entry, base or Path())
    if dataset.type == "webdataset":
        return _tars(dataset, entry, base or Path())
    if dataset.type == "aws":
        return dataset, []  # see buckets.py
    return dataset, _folder(dataset.instance_data_dir)


def text_cache_problems(text: TextCacheConfig) -> Problems:
    if text.type in CAPTIONED_TYPES:
        return [("type", f"{text.type} is for images; embeddings are kept in a local folder")]
    return []


def _folder(folder: Path | None) -> Problems:
    if folder is None:
        return [("instance_data_dir", "is missing; name the folder of the images")]
    if not os.path.exists(folder):
        return [("instance_data_dir", f"there is no folder {quoted(folder)}; {_hint(folder)}")]
    if not os.path.isdir(folder):
        return [("instance_data_dir", f"{quoted(folder)} is a file; name the folder it is in")]
    return []


def _hint(path: str | Path) -> str:
    """What to do about a path that does not exist."""
    text = str(path)
    if any(letter in text for letter in "\t\n\r\b\f"):
        return "in JSON, write each backslash twice, or write / instead"
    if re.match(r"[A-Za-z]:[\\/]", text) and os.sep == "/":
        return "paths of Windows are not known here; in WSL, C:\\ is /mnt/c/"
    return "remove the blank at its end" if text != text.rstrip() else "check the path"


def _library_rows(dataset: DatasetConfig, entry: Mapping[str, Any], base: Path) -> tuple[DatasetConfig, Problems]:
    """A Hugging Face dataset. Its path stays as it stands where there is nothing of that name here, but it may be an id."""
    problems: Problems = []
    if lacks := lacking("huggingface", "datasets", "datasets"):
        problems.append(("type", lacks))
    if entry.get("caption_strategy") == "filename":
        problems.append(("caption_strategy", "filename has nothing to say of rows, which have no names; use textfile"))
    if not dataset.path:
        return dataset, [*problems, ("path", "is missing; name the folder of the dataset, or its id on the hub")]
    path = dataset.path
    here = base / Path(path).expanduser()
    if os.path.exists(here):
        path = str(here)
    elif not _HUB_ID.fullmatch(path):
        problems.append(("path", f"there is no folder {quoted(path)}; {_hint(path)}"))
    return dataclasses.replace(_with_captions(dataset, entry), path=path), problems


def _tars(dataset: DatasetConfig, entry: Mapping[str, Any], base: Path) -> tuple[DatasetConfig, Problems]:
    problems: Problems = []
    shards: list[Path] = []
    if not dataset.urls:
        problems.append(("urls", "is missing; name the tars, such as /data/pictures-{00000..00012}.tar"))
    for pattern in dataset.urls:
        if "://" in pattern or pattern.startswith("pipe:"):
            problems.append(("urls", f"{pattern!r} is an address; only paths are available yet"))
            continue
        try:
            shards += [base / Path(name).expanduser() for name in expanded(pattern)]
        except ValueError as error:
            problems.append(("urls", f"{pattern!r} {error}"))
    wrong = list(shard_problems(shards))
    if wrong:
        problems.append(("urls", wrong[0] + (f" ({len(wrong) - 1:,} more like it)" if len(wrong) > 1 else "")))
    return dataclasses.replace(_with_captions(dataset, entry), shards=tuple(shards)), problems


def _with_captions(dataset: DatasetConfig, entry: Mapping[str, Any]) -> DatasetConfig:
    """The option's `filename` is meant for folders: here captions come with the images where the entry says nothing."""
    if entry.get("caption_strategy") is None and dataset.caption_strategy == "filename":
        return dataclasses.replace(dataset, caption_strategy="textfile")
    return dataset
