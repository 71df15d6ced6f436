"""What became of the files of every data set: for people one line and a page, for programs dataset_report.json."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helpers.data.buckets import BucketPlan
from helpers.data.catalogue import Catalogue
from helpers.data.scan import ScanResult
from helpers.storage.atomic import write_json

if TYPE_CHECKING:
    from helpers.data.thumbnails import Thumbnail
    from helpers.protocols import CaptionLengths

REPORT = "dataset_report.json"
MOST_CAPTIONS_COUNTED = 20_000  # of a data set: seconds of work; of more captions every n-th is counted
MOST_SHARED_CAPTIONS = 100  # that are listed
SIZE_EDGES = (0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 128)  # megapixels; nothing above 128 is trained on
ASPECT_EDGES = tuple(round(2 ** (exponent / 8), 3) for exponent in range(-17, 18, 2))  # width / height; 1 is the middle of a bin


@dataclass(frozen=True)
class Survey:
    """What is known of the data, for reporters. `thumbnails` opens files, a bounded number, so it is called by whoever shows them."""

    report: dict[str, Any]  # the content of dataset_report.json
    thumbnails: Callable[[], Sequence[Thumbnail]]


class Memory:
    """Results that take long to have, kept in a JSON file by what they were made from. Losing it costs time and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used: dict[str, Any] = {}
        try:
            self.known: dict[str, Any] = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            self.known = {}

    def recall(self, make: Callable[[], Any], *made_from: str) -> Any:
        """What `make()` gave for these before, or gives now: a value as JSON holds it, or None, which is not remembered."""
        name = sha256(json.dumps(made_from).encode()).hexdigest()
        value = self.known.get(name)
        if value is None:
            value = make()
        if value is not None:
            self.used[name] = value
        return value

    def save(self) -> None:
        """Keep what was recalled, and forget the rest. StorageError when it cannot be written."""
        if self.used != self.known:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.used)
            self.known = self.used


def dataset_report(results: Sequence[ScanResult], plan: BucketPlan, catalogue: Catalogue) -> dict[str, Any]:
    """The content of dataset_report.json but for captions' lengths, data sets in the order of `results`, which is the plan's.

    `upscaled` counts images resized to more pixels than they have; `cropped_share` is the mean share of a resized image's area that
    the cut removes, from 0 to 1. `sizes` and `aspects` are histograms of the files' own megapixels and width / height: bin i counts
    what is in [edges[i], edges[i + 1]), and the outer bins also what lies beyond. `copies` are keys of equal bytes among the images
    whose bytes have been read; of `unread` ones nobody knows.
    """
    return {"datasets": [_entry(index, result, plan, catalogue) for index, result in enumerate(results)]}


def _entry(index: int, result: ScanResult, plan: BucketPlan, catalogue: Catalogue) -> dict[str, Any]:
    rows = plan.columns[plan.columns["dataset"] == index]
    counts = np.bincount(rows["shape"], minlength=len(plan.shapes))
    areas = np.array([shape.area for shape in plan.shapes], np.float64)
    kept = areas[rows["shape"]] / (rows["resized_width"].astype(np.float64) * rows["resized_height"])
    width, height = rows["width"].astype(np.float64), rows["height"].astype(np.float64)
    return {
        "id": result.dataset,
        "found": result.found,
        "used": result.used,
        "left_out": [{"key": entry.key, "reason": entry.reason} for entry in catalogue.left_out(result.dataset)],
        "buckets": {str(shape): int(count) for shape, count in zip(plan.shapes, counts, strict=True) if count},
        "upscaled": int(rows["upscaled"].sum()),
        "cropped_share": round(float(1 - kept.mean()), 4),
        "sizes": _histogram(width * height / 1e6, SIZE_EDGES),
        "aspects": _histogram(width / height, ASPECT_EDGES),
        "copies": list(catalogue.copies(result.dataset)),
        "unread": catalogue.unread(result.dataset),
    }


def _histogram(values: NDArray[np.float64], edges: Sequence[float]) -> dict[str, list[float]]:
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return {"edges": list(edges), "counts": np.bincount(bins, minlength=len(edges) - 1).tolist()}


def caption_report(dataset: str, catalogue: Catalogue, lengths: CaptionLengths, memory: Memory) -> dict[str, Any]:
    """The distinct captions of a data set: how long they are in tokens, as [[length, captions of this length], ...], and the most shared.

    `counted` of the `distinct` ones are measured, every n-th in their order where they are many; `truncated` of these are longer than the
    `limit` that the text encoders read.
    """
    distinct, step, captions = 0, 1, list[str]()
    shared: list[tuple[int, str]] = []  # a heap whose first is the least shared
    for caption, images in catalogue.caption_counts(dataset):  # one pass: sorting a million takes seconds
        if distinct % step == 0:
            captions.append(caption)
            if len(captions) > MOST_CAPTIONS_COUNTED:
                captions, step = captions[::2], step * 2
        distinct += 1
        if images > 1:
            heapq.heappush(shared, (images, caption))
            if len(shared) > MOST_SHARED_CAPTIONS:
                heapq.heappop(shared)
    tokens: list[list[int]] = memory.recall(lambda: _tally(lengths.of(captions)), lengths.fingerprint, *captions)
    return {
        "distinct": distinct,
        "counted": len(captions),
        "limit": lengths.limit,
        "truncated": sum(count for length, count in tokens if length > lengths.limit),
        "tokens": tokens,
        "shared": [{"caption": caption, "images": images} for images, caption in sorted(shared, key=lambda each: (-each[0], each[1]))],
    }


def _tally(lengths: Sequence[int]) -> list[list[int]]:
    return [[length, count] for length, count in sorted(Counter(lengths).items())]


def summary(result: ScanResult, shapes: int) -> str:
    """One line for the console, such as `portraits: 31 files = 29 used + 2 left out (2 unreadable) · 4 shapes`."""
    line = f"{result.dataset}: {result.found:,} files = {result.used:,} used + {result.left_out:,} left out"
    if result.kinds:
        line += " (" + ", ".join(f"{count:,} {kind}" for kind, count in result.kinds.items()) + ")"
    return line + f" · {shapes:,} shape{'s' if shapes != 1 else ''}"
