"""Images that the layout of folders uses otherwise than was meant: in two datasets, or in folders whose names say repeats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from helpers.config.datasets import DatasetConfig
from helpers.config.expansion import KOHYA_FOLDER
from helpers.data.catalogue.catalogue import Catalogue

# Datasets of one place that differ in one of these are meant to share their images.
_VIEWS = ("resolution", "resolution_type", "crop", "crop_style", "crop_aspect", "crop_aspect_buckets", "flip")


def overlap_lines(datasets: Sequence[DatasetConfig], catalogue: Catalogue) -> list[str]:
    """One line for the console for every two datasets that share images, with both ids, the counts and the remedy.

    Files count as one if size, times and inode (in a bucket: the ETag) are equal, so links are seen through. The datasets that an entry
    with several resolutions stands for share their images on purpose, as do entries of one folder that crop it in different ways.
    """
    firsts: dict[tuple[str, ...], DatasetConfig] = {}
    lines = []
    for dataset in datasets:
        first = firsts.setdefault(_place(dataset), dataset)
        if first is not dataset and dataset.dataset_type == first.dataset_type == "image" and _is_same_view(first, dataset):
            lines.append(_twice(first, dataset, catalogue))
    lines += [line for one, other in itertools.combinations(firsts.values(), 2) if (line := _line(one, other, catalogue))]
    return lines


def kohya_line(dataset: DatasetConfig, catalogue: Catalogue) -> str:
    """What to write if all folders of a dataset in a bucket have names as in kohya's scripts; else "".

    The settings expand `"layout": "kohya"` before any request is sent, so in buckets each folder needs an entry.
    """
    if dataset.type != "aws":
        return ""
    folders = catalogue.first_folders(dataset.id)
    names = [found for folder in folders if (found := KOHYA_FOLDER.fullmatch(folder)) and int(found[1])]
    if not names or len(names) < len(folders):
        return ""
    prefix = (dataset.aws_data_prefix or "").strip("/")
    place = f"{prefix}/{names[0][0]}" if prefix else names[0][0]
    said = f"the folders in {_shown(dataset)} have names as in kohya's scripts, which count for nothing in buckets"
    return f'{said}; write an entry for each, such as "aws_data_prefix": "{place}" with "repeats": {int(names[0][1]) - 1}'


def all_entries(datasets: Sequence[DatasetConfig]) -> Iterator[DatasetConfig]:
    """The datasets, and each of their companions' datasets once."""
    yield from datasets
    yield from {of.id: of for dataset in datasets for of in dataset.companions.values()}.values()


def _place(dataset: DatasetConfig) -> tuple[str, ...]:
    if dataset.type == "local":
        return ("local", str(Path(dataset.instance_data_dir).resolve()))
    if dataset.type == "aws":
        return ("aws", dataset.aws_endpoint_url or "", dataset.aws_bucket_name or "", (dataset.aws_data_prefix or "").strip("/"))
    if dataset.type == "huggingface":
        return ("huggingface", str(dataset.path), dataset.split or "")
    return ("webdataset", *sorted(map(str, dataset.shards)))


def _shown(dataset: DatasetConfig) -> str:
    if dataset.type == "aws":
        return f"s3://{dataset.aws_bucket_name}/{(dataset.aws_data_prefix or '').strip('/')}"
    return str(dataset.instance_data_dir if dataset.type == "local" else dataset.path or "the tars")


def _is_inside(inner: DatasetConfig, outer: DatasetConfig) -> bool:
    here, there = _place(inner), _place(outer)
    if here[:-1] != there[:-1] or inner.type not in ("local", "aws"):
        return False
    return Path("/", here[-1]).is_relative_to(Path("/", there[-1]))


def _is_same_view(one: DatasetConfig, other: DatasetConfig) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _VIEWS)


def _twice(one: DatasetConfig, other: DatasetConfig, catalogue: Catalogue) -> str:
    shared = catalogue.shared_files(one.id, other.id)
    return f"{one.id} and {other.id} both read {_shown(one)}, so its {shared:,} images are trained twice; remove one, or use `repeats`"


def _line(one: DatasetConfig, other: DatasetConfig, catalogue: Catalogue) -> str:
    """What two datasets of different places share; "" if they share nothing, or both are companions."""
    if "image" not in (one.dataset_type, other.dataset_type) or not (shared := catalogue.shared_files(one.id, other.id)):
        return ""
    inner, outer = (one, other) if _is_inside(one, other) else (other, one)
    if "aws" in (one.type, other.type) and not _is_inside(inner, outer):
        return ""  # equal objects, uploaded in the same second: a bucket has no links
    counts = f"{shared:,} of {catalogue.totals(outer.id)[0]:,} images of {outer.id} are also in {inner.id}"
    where = f"{_shown(inner)} is inside {_shown(outer)}" if _is_inside(inner, outer) else "links lead to the same files"
    remedy = f"move {_shown(inner)} out of {_shown(outer)}" if _is_inside(inner, outer) else "remove the links"
    what = "with the captions of both" if inner.dataset_type == outer.dataset_type else f"as images and as {inner.dataset_type}"
    return f"{counts}: {where}, so they are trained {what}; {remedy}, or disable one of the datasets"
