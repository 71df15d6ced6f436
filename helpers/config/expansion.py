"""Entries that stand for several datasets: one for each of several resolutions, or for each folder of the kohya layout."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.config.datasets import DatasetConfig, complete

KOHYA_FOLDER = re.compile(r"(\d{1,3})_(.*\S.*)", re.DOTALL)  # images per epoch, and the class or the trigger word
_OF_THE_FOLDERS = ("repeats", "probability", "conditioning_data", "mask_data")  # keys that the kohya layout decides, or cannot share


@dataclass(frozen=True)
class KohyaFolders:
    """The folders below a folder of images, told apart by their names."""

    named: tuple[tuple[str, int, str], ...]  # such as ("10_sks dog", 10, "sks dog"), sorted
    others: tuple[str, ...]  # folders without a number, or with 0
    files: int  # files that are in no folder


def kohya_folders(folder: Path) -> KohyaFolders:
    """Sort the folders below `folder`. Nothing is found where it cannot be listed, which the scan reports."""
    named, others, files = [], [], 0
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return KohyaFolders((), (), 0)
    for entry in entries:
        found = KOHYA_FOLDER.fullmatch(entry.name)
        if not entry.is_dir():
            files += not entry.name.startswith(".")
        elif found and int(found[1]):
            named.append((entry.name, int(found[1]), found[2].strip()))
        elif entry.name[0] not in "._@#$":  # system folders, which the scan does not enter
            others.append(entry.name)
    return KohyaFolders(tuple(named), tuple(others), files)


def looks_like_kohya(dataset: DatasetConfig) -> str | None:
    """The name of a folder as kohya's scripts have them, in a local dataset whose folders all have such names; else None."""
    if dataset.layout is not None or dataset.type != "local" or dataset.instance_data_dir is None:
        return None
    found = kohya_folders(dataset.instance_data_dir)
    return found.named[0][0] if found.named and not found.others else None


def kohya_problems(dataset: DatasetConfig, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) of an entry with the kohya layout."""
    for key in _OF_THE_FOLDERS:
        if entry.get(key) is not None and getattr(dataset, key) != "alpha":
            why = "the folders' names give the repeats" if key in _OF_THE_FOLDERS[:2] else "each folder would need its own"
            yield key, f'cannot be used with "layout": "kohya": {why}; remove it, or write one entry for each folder'
    folder = dataset.instance_data_dir
    if folder is not None and folder.is_dir() and not kohya_folders(folder).named:
        yield "layout", f"there is no folder such as 10_dog in {folder}; rename its folders, or remove layout"


def kohya_note(dataset: DatasetConfig) -> str:
    """What of the folder the kohya layout does not read; "" if nothing."""
    found = kohya_folders(dataset.instance_data_dir)
    parts = []
    if found.others:
        parts.append(f"{_count(len(found.others), 'folder')} without a number, such as {found.others[0]!r}")
    if found.files:
        parts.append(f"{_count(found.files, 'file')} outside of folders")
    return f"does not read {' and '.join(parts)} in {dataset.instance_data_dir}" if parts and found.named else ""


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' if number != 1 else ''}"


def expanded(
    dataset: DatasetConfig, entry: Mapping[str, Any], resolutions: Sequence[float], options: Mapping[str, object]
) -> list[DatasetConfig]:
    """The datasets that an entry stands for: itself, or one for each folder and each resolution.

    A folder's dataset is called NAME/FOLDER, and that of a resolution NAME@512. At a resolution, images with a shorter edge are left out
    unless the entry says `minimum_image_size`.
    """
    by_folder = _by_folder(dataset, entry) if dataset.layout == "kohya" and dataset.instance_data_dir is not None else [dataset]
    if not resolutions:
        return by_folder
    return [_at(one, size, len(resolutions), entry, options) for one in by_folder for size in resolutions]


def _by_folder(dataset: DatasetConfig, entry: Mapping[str, Any]) -> list[DatasetConfig]:
    strategy = dataset.caption_strategy if entry.get("caption_strategy") is not None else "textfile"
    endings = dataset.caption_extensions or ((".txt", ".caption") if strategy == "textfile" else ())  # which kohya's scripts write
    return [
        dataclasses.replace(
            dataset,
            id=f"{dataset.id}/{name}",
            instance_data_dir=dataset.instance_data_dir / name,
            repeats=count - 1,
            fallback_caption=caption,
            caption_strategy=strategy,
            caption_extensions=endings,
        )
        for name, count, caption in kohya_folders(dataset.instance_data_dir).named
    ]


def _at(dataset: DatasetConfig, size: float, sizes: int, entry: Mapping[str, Any], options: Mapping[str, object]) -> DatasetConfig:
    smallest = dataset.minimum_image_size
    if entry.get("minimum_image_size") is None:
        smallest = max(size, smallest or 0)
    share = None if dataset.probability is None else dataset.probability / sizes
    one = dataclasses.replace(dataset, id=f"{dataset.id}@{size:g}", resolution=size, minimum_image_size=smallest, probability=share)
    return complete(one, options)
