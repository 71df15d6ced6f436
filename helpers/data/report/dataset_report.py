"""The dataset report: how many files were found, used and left out, and why. One line for the console, dataset_report.json for programs."""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig
from helpers.data.base.sample import Size
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.masks import ALPHA, BRIGHTNESS, DIM, measured_masks
from helpers.data.catalogue.scan import ScanResult
from helpers.data.order.epoch_order import Mix
from helpers.data.plan.buckets import BucketPlan
from helpers.storage.memo import Memo, digest_of

if TYPE_CHECKING:
    from helpers.data.ports import CaptionLengths

REPORT = "dataset_report.json"
BALANCED = (
    "regularization images are drawn as often as the others, however many there are, and an epoch ends when the others have been trained "
    '("probability" or "ignore_epochs" in a dataset changes this)'
)
MOST_CAPTIONS_COUNTED = 20_000  # tokenized per dataset, which takes seconds; if there are more captions, every n-th is taken
MOST_SHARED_CAPTIONS = 100  # listed per dataset
COVERAGE_EDGES = tuple(round(tenth / 10, 1) for tenth in range(11))
SIZE_EDGES = (0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 128)  # megapixels; larger images are left out
ASPECT_EDGES = tuple(round(2 ** (exponent / 8), 3) for exponent in range(-17, 18, 2))  # width / height; 1 is in the middle of a bin


def dataset_report(
    results: Sequence[ScanResult],
    plan: BucketPlan,
    catalogue: Catalogue,
    faceless: Mapping[str, NDArray[np.int64]] | None = None,
    failed: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """The content of dataset_report.json, except for captions. `results` are in the order of the plan's datasets.

    `faceless`: for datasets cropped around faces, the catalogue rows of images without a detected face.
    `failed`: images of the plan that could not be encoded, catalogue row => reason as "kind: detail".

    In the result, `upscaled` counts images that are enlarged. `cropped_share` is the mean share of a resized image's area that is cropped
    away, from 0 to 1. `sizes` and `aspects` are histograms of the files' megapixels and width / height: bin i counts values in [edges[i],
    edges[i + 1]), and the first and last bin also those beyond. `copies` are groups of files with equal bytes, among the files that have
    been read; `unread` counts the others.
    `skipped_folders` are system folders, such as recycle bins, that were not read.
    """
    failed = failed or {}
    usable = ~np.isin(plan.columns["row"], list(failed))
    lost: dict[str, list[dict[str, str]]] = {}
    for row, reason in failed.items():
        sample = catalogue.sample(row)
        lost.setdefault(sample.dataset, []).append({"key": sample.key, "reason": reason})
    rows = plan.columns[usable]
    entries = []
    for index, result in enumerate(results):
        own = rows[rows["dataset"] == index]
        entries.append(_entry(result, own, plan, catalogue, lost.get(result.dataset, [])))
        if faceless and result.dataset in faceless:
            entries[-1]["without_a_face"] = int(np.isin(own["row"], faceless[result.dataset]).sum())
    return {"datasets": entries}


def _entry(result: ScanResult, rows: NDArray[Any], plan: BucketPlan, catalogue: Catalogue, lost: list[dict[str, str]]) -> dict[str, Any]:
    """The entry of one dataset. `rows` are its rows of the plan, `lost` the images that failed after the scan."""
    counts = np.bincount(rows["shape"], minlength=len(plan.shapes))
    areas = np.array([shape.area for shape in plan.shapes], np.float64)
    kept = areas[rows["shape"]] / (rows["resized_width"].astype(np.float64) * rows["resized_height"])
    left_out = [{"key": entry.key, "reason": entry.reason} for entry in catalogue.left_out(result.dataset)]
    width, height = rows["width"].astype(np.float64), rows["height"].astype(np.float64)
    return {
        "id": result.dataset,
        "found": result.found,
        "used": result.used - len(lost),
        "left_out": sorted(left_out + lost, key=lambda item: item["key"]),
        **({"tables": [dataclasses.asdict(table) for table in result.tables]} if result.tables else {}),
        "buckets": {str(shape): int(count) for shape, count in zip(plan.shapes, counts, strict=True) if count},
        "upscaled": int(rows["upscaled"].sum()),
        "cropped_share": round(float(1 - kept.mean()), 4) if len(kept) else 0.0,
        "sizes": _histogram(width * height / 1e6, SIZE_EDGES),
        "aspects": _histogram(width / height, ASPECT_EDGES),
        "copies": list(catalogue.copies(result.dataset)),
        "unread": catalogue.unread(result.dataset),
        "skipped_folders": catalogue.skipped_folders(result.dataset),
    }


def _histogram(values: NDArray[np.float64], edges: Sequence[float]) -> dict[str, list[float]]:
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return {"edges": list(edges), "counts": np.bincount(bins, minlength=len(edges) - 1).tolist()}


def lost_line(failed: Mapping[int, str]) -> str:
    """One line for the console about images that could not be encoded."""
    kinds = Counter(reason.partition(":")[0] for reason in failed.values())
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return f"{len(failed):,} more left out, found while encoding ({counts}); {REPORT} names them"


def caption_report(dataset: str, catalogue: Catalogue, lengths: CaptionLengths, memo: Memo) -> dict[str, Any]:
    """The distinct captions of a dataset: their lengths in tokens, and the captions that most images share.

    `tokens` is [[length, number of captions], ...] for `counted` of the `distinct` captions; if there are many, every n-th is counted.
    `truncated` of these are longer than the text encoders' `limit`, which is None if there is no limit.
    """
    distinct, step, captions = 0, 1, list[str]()
    shared: list[tuple[int, str]] = []  # a heap; the first is the least shared
    for caption, images in catalogue.caption_counts(dataset):  # a single pass: the query takes seconds for a million captions
        if distinct % step == 0:
            captions.append(caption)
            if len(captions) > MOST_CAPTIONS_COUNTED:
                captions, step = captions[::2], step * 2
        distinct += 1
        if images > 1:
            heapq.heappush(shared, (images, caption))
            if len(shared) > MOST_SHARED_CAPTIONS:
                heapq.heappop(shared)
    inputs = digest_of(lengths.fingerprint, captions)
    tokens = memo.recall(f"tokens of {dataset}", inputs, lambda: _tally(lengths.token_counts(captions)))
    return {
        "distinct": distinct,
        "counted": len(captions),
        "limit": lengths.limit,
        "truncated": 0 if lengths.limit is None else sum(count for length, count in tokens if length > lengths.limit),
        "tokens": tokens,
        "shared": [{"caption": caption, "images": images} for images, caption in sorted(shared, key=lambda each: (-each[0], each[1]))],
    }


def _tally(lengths: Sequence[int]) -> list[list[int]]:
    return [[length, count] for length, count in sorted(Counter(lengths).items())]


def mask_report(dataset: DatasetConfig, catalogue: Catalogue) -> dict[str, Any]:
    """How much of a dataset's images their loss masks show white.

    `coverage` is the mean share of white, from 0 to 1, and `coverages` its histogram, as `sizes`. `whole` images are trained whole: their
    mask is all white, or, of them, `without_alpha` have no alpha channel. `dim` masks have no pixel of half the brightness of white, such
    as `dim_example`.
    """
    masks = measured_masks(catalogue, dataset.id, ALPHA if dataset.alpha_is_mask else BRIGHTNESS)
    shares = np.array([1.0 if mean is None else mean for _, mean, _ in masks])
    dim = [key for key, _, brightest in masks if brightest is not None and brightest < DIM]
    return {
        "data": dataset.mask_data,
        "outside_weight": dataset.mask_outside_weight,
        "coverage": round(float(shares.mean()), 4) if masks else 0.0,
        "coverages": _histogram(shares, COVERAGE_EDGES),
        "whole": int((shares == 1).sum()),
        "without_alpha": sum(mean is None for _, mean, _ in masks) if dataset.alpha_is_mask else 0,
        "dim": len(dim),
        "dim_example": dim[0] if dim else "",
    }


def mask_line(dataset: str, used: int, masks: Mapping[str, Any]) -> str:
    """One line for the console, such as `portraits: 24 masks, 31.2 % white on average; what is black has the loss weight 0`."""
    line = f"{dataset}: {used:,} mask{'s' if used != 1 else ''}, {100 * masks['coverage']:.1f} % white on average"
    if masks["without_alpha"]:
        line += f" · {masks['without_alpha']:,} of {used:,} images have no alpha channel and are trained whole"
    elif masks["whole"]:
        line += f" · {masks['whole']:,} of {used:,} are white all over"
    if masks["dim"]:
        line += f" · {masks['dim']:,} of {used:,} are darker than half of white everywhere, such as {masks['dim_example']}; white is 255"
    return f"{line}; what is black has the loss weight {masks['outside_weight']:g}"


def companions_report(results: Sequence[ScanResult], catalogue: Catalogue) -> list[dict[str, Any]]:
    """The entries of datasets of companions. A companion counts as used even if its image is left out."""
    return [
        {
            "id": result.dataset,
            "found": result.found,
            "used": result.used,
            "left_out": [{"key": entry.key, "reason": entry.reason} for entry in catalogue.left_out(result.dataset)],
        }
        for result in results
    ]


def summary(result: ScanResult, buckets: int | None = None) -> str:
    """One line for the console, such as `portraits: 31 files = 29 used + 2 left out (2 unreadable) · 4 buckets`."""
    line = f"{result.dataset}: {result.found:,} files = {result.used:,} used + {result.left_out:,} left out"
    if result.kinds:
        line += " (" + ", ".join(f"{count:,} {kind}" for kind, count in result.kinds.items()) + ")"
    if result.skipped_folders:
        line += f" · {result.skipped_folders:,} system folder{'s' if result.skipped_folders > 1 else ''} not read"
    for table in result.tables:
        if stray := table.unnamed + table.without_image:
            such_as = f", such as {table.example!r}" if table.example else ""
            line += f" · {stray:,} of {table.rows:,} rows of {table.path} name no image{such_as}"
        if table.swapped:
            swapped = f"{table.swapped:,} of {table.compared:,} images compared"
            line += f" · {table.path} has sizes before EXIF rotation ({swapped}): all sizes are read from the images instead"
    return line if buckets is None else line + f" · {buckets:,} bucket{'s' if buckets != 1 else ''}"


def long_sides_line(dataset: DatasetConfig, shapes: Sequence[Size]) -> str:
    """One line for the console if training sizes are much larger than a square at the dataset's resolution in pixels; else ""."""
    largest = max(shapes, key=lambda shape: shape.area, default=None)
    if dataset.resolution_type != "pixel" or largest is None or largest.area <= 4 * dataset.resolution**2:
        return ""
    return (
        f"training sizes of up to {largest} ({largest.area / 1e6:.1f} megapixels), because resolution_type pixel does not limit the longer"
        " side; set maximum_aspect and minimum_aspect, or resolution_type area"
    )


def cut_off_line(count: int) -> str:
    """One line for the console about captions that are cut off."""
    are = "is" if count == 1 else "are"
    return f"{count:,} caption{'s' if count != 1 else ''} {are} longer than the text encoders read, and {are} cut off"


def mix_summary(datasets: Sequence[str], mix: Mix) -> str:
    """One line for the console, such as `faces 60 % + streets 40 % of the micro-batches, for 75 % of an epoch, until faces is used up`."""
    until = mix.even_from
    shares = mix.early * mix.counts / (until * mix.counts.sum())
    line = " + ".join(f"{dataset} {100 * share:.0f} %" for dataset, share in zip(datasets, shares, strict=True)) + " of the micro-batches"
    return line if until == 1 else f"{line}, for {100 * until:.0f} % of an epoch, until {datasets[int(mix.early.argmax())]} is used up"
