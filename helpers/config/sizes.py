"""Sizes and crops of a dataset: combinations that cannot be used, and settings without effect."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.config.datasets import DatasetConfig
from helpers.config.libraries import install, nothing_is_installed

IN_THE_UNIT = ("minimum_image_size", "maximum_image_size", "target_downsample_size")  # in the unit of the set's own resolution_type
ALIGNMENTS = (8, 64)
# In the data folder of OpenCV 4; OpenCV 5 ships no detector of faces that needs no other download.
FACE_CASCADE = "haarcascade_frontalface_alt2.xml"
PROFILE_CASCADE = "haarcascade_profileface.xml"

_WITH_CROP = ("crop_style", "crop_aspect", "crop_aspect_buckets", "maximum_image_size", "target_downsample_size")


def size_problems(dataset: DatasetConfig) -> Iterator[str]:
    """One sentence for every combination of a dataset's sizes and crops that cannot be used."""
    name = f"dataset {dataset.id!r}"
    yield from _shrinking(name, dataset)
    if dataset.minimum_aspect and dataset.maximum_aspect and dataset.minimum_aspect > dataset.maximum_aspect:
        yield f"{name}: minimum_aspect {dataset.minimum_aspect:g} is above maximum_aspect {dataset.maximum_aspect:g}; exchange them."
    if not dataset.crop:
        return
    if dataset.crop_aspect == "random" and not dataset.crop_aspect_buckets:
        yield f"{name}: crop_aspect random needs crop_aspect_buckets, the shapes to draw from, such as [0.67, 1, 1.5]."
    if dataset.crop_style == "face" and not finds_faces():
        yield (
            f"{name}: crop_style face needs the face detector of OpenCV 4, which OpenCV 5 no longer has;"
            f" {install('opencv-python-headless')}, or choose another crop_style."
        )


def _shrinking(name: str, dataset: DatasetConfig) -> Iterator[str]:
    largest, shrunk = dataset.maximum_image_size, dataset.target_downsample_size
    if largest is None and shrunk is None:
        return
    if shrunk is None:
        yield f"{name}: maximum_image_size {largest:g} needs target_downsample_size, the size to which larger images are downscaled."
    elif largest is None:
        yield f"{name}: target_downsample_size {shrunk:g} needs maximum_image_size, above which images are downscaled to it."
    elif shrunk > largest:
        yield f"{name}: target_downsample_size {shrunk:g} is above maximum_image_size {largest:g}, so images would be upscaled. Lower it."
    elif dataset.crop and shrunk < dataset.resolution:
        yield (
            f"{name}: target_downsample_size {shrunk:g} is below the resolution {dataset.resolution:g},"
            " so a crop of the training size would not fit in the smaller image; raise it."
        )


def finds_faces() -> bool:
    """Whether an OpenCV with a face detector is installed; found out from its files, because importing it takes a while."""
    if nothing_is_installed():
        return True  # checked again after the installation
    library = importlib.util.find_spec("cv2")
    folders = (library.submodule_search_locations if library else None) or []
    return any((Path(folder) / "data" / FACE_CASCADE).is_file() for folder in folders)


def size_notes(entry: Mapping[str, Any], dataset: DatasetConfig) -> Iterator[str]:
    """For every key of an entry that has no effect beside the others: the key, and why it does nothing."""
    for key in (key for key in _WITH_CROP if entry.get(key) is not None):
        if not dataset.crop:
            yield f"{key} does nothing while crop is off"
        elif key == "crop_aspect_buckets" and dataset.crop_aspect != "random":
            yield f"{key} does nothing while crop_aspect is {dataset.crop_aspect}"


def size_option_notes(options: Mapping[str, Any], datasets: Sequence[DatasetConfig]) -> Iterator[str]:
    """The same of the options that datasets fall back to."""
    for name in ("maximum_image_size", "target_downsample_size"):
        if options[name] is not None and datasets and not any(dataset.crop for dataset in datasets):
            yield f"--{name} does nothing while crop is off in every dataset."
