"""How every image becomes training pixels: sizes in, `Geometry` out. Pure arithmetic; opens no file and draws no number.

An image keeps its aspect. It is resized so that it just covers its target, and what sticks out is cut away. The target depends on
the image's own size and on the rule of its data set alone, so adding or removing other images changes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from helpers.data.sample import Geometry, Size

MAX_ASPECT = 50  # beyond this, a picture is a line: covering even the thinnest target would blow it up out of memory

Integers = NDArray[np.int64]

ROW = np.dtype(
    [
        ("row", np.int64),  # the image's row in the catalogue
        ("width", np.int32),  # of the image as shown
        ("height", np.int32),
        ("resized_width", np.int32),
        ("resized_height", np.int32),
        ("top", np.int32),  # of the cut, in resized pixels
        ("left", np.int32),
        ("dataset", np.int16),  # index in `BucketPlan.datasets`
        ("shape", np.int16),  # index in `BucketPlan.shapes`
        ("flip", np.bool_),
        ("upscaled", np.bool_),  # resized to more pixels than the file has
    ]
)


@dataclass(frozen=True)
class ResolutionRule:
    """What a data set says of sizes and cuts.

    `resolution` is megapixels (1.0 = 10^6 pixels) when `resolution_type` is area, else the shorter edge in pixels. With `crop` off
    the cut is central and serves alignment only; with `crop` on it follows `crop_style` (corner is bottom right) and
    `crop_aspect`. `minimum_image_size` has the unit of `resolution`; 0 accepts all.
    """

    resolution: float = 1.0
    resolution_type: Literal["area", "pixel"] = "area"
    alignment: int = 64  # target edges are multiples of this many pixels
    crop: bool = False
    crop_style: Literal["center", "corner", "random"] = "random"
    crop_aspect: Literal["square", "preserve"] = "square"
    minimum_image_size: float = 0

    @property
    def style(self) -> Literal["center", "corner", "random"]:
        """Where the cut is made."""
        return self.crop_style if self.crop else "center"

    @property
    def square(self) -> bool:
        """Whether every target is square, whatever the image's aspect."""
        return self.crop and self.crop_aspect == "square"


@dataclass(frozen=True)
class DatasetColumns:
    """The usable images of one data set, in key order, as arrays of equal length N.

    `crop_u` and `crop_v` in [0, 1) place a random cut from left to right and from top to bottom; needed only where
    `rule.style` is random. `flip` marks the images to mirror; None mirrors none.
    """

    dataset: str
    rule: ResolutionRule
    rows: Integers
    width: Integers
    height: Integers
    crop_u: NDArray[np.float64] | None = None
    crop_v: NDArray[np.float64] | None = None
    flip: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class BucketPlan:
    """The cut of every sample, ordered by (data set, key). Sample i of the plan is `columns[i]`, of dtype `ROW`."""

    datasets: tuple[str, ...]
    shapes: tuple[Size, ...]  # every target size in use, sorted
    columns: NDArray[Any]

    def __len__(self) -> int:
        return len(self.columns)

    def geometry(self, index: int) -> Geometry:
        row = self.columns[index]
        return Geometry(
            original=Size(int(row["width"]), int(row["height"])),
            resized=Size(int(row["resized_width"]), int(row["resized_height"])),
            top=int(row["top"]),
            left=int(row["left"]),
            target=self.shapes[row["shape"]],
            flip=bool(row["flip"]),
        )

    def fingerprint(self) -> str:
        """64 hex digits that change with any cut, the number of samples or their order.

        Catalogue rows do not count: they number the same images differently in a catalogue that was built anew. What the images
        are is told by their content hashes.
        """
        digest = hashlib.sha256(repr((self.datasets, self.shapes)).encode())
        for name in ROW.names or ():
            if name != "row":
                digest.update(np.ascontiguousarray(self.columns[name]).tobytes())
        return digest.hexdigest()


def target_size(size: Size, rule: ResolutionRule) -> Size:
    """The training size of an image: its aspect at the rule's resolution, each edge to the nearest multiple of the alignment."""
    width, height = _targets(np.array([size.width]), np.array([size.height]), rule)
    return Size(int(width[0]), int(height[0]))


def geometry(size: Size, rule: ResolutionRule, u: float = 0.5, v: float = 0.5, flip: bool = False) -> Geometry:
    """The cut of one image; `u` (from the left) and `v` (from the top) in [0, 1) place it where the rule's style is random."""
    cut = _cuts(np.array([size.width]), np.array([size.height]), rule, np.array([u]), np.array([v]))
    rw, rh, top, left, tw, th = (int(column[0]) for column in cut)
    return Geometry(size, Size(rw, rh), top, left, Size(tw, th), flip)


def too_small(size: Size, rule: ResolutionRule) -> str | None:
    """Why an image is not to be trained on at all, as "kind: detail", or None.

    Pixels: both edges count. Megapixels: the area counts, and for square cuts also that a square of that area fits inside.
    """
    if max(size) > MAX_ASPECT * min(size):
        return f"too narrow: {size}, one side is more than {MAX_ASPECT} times the other"
    minimum = rule.minimum_image_size
    if rule.resolution_type == "pixel":
        return f"below {minimum:g} px: {size}" if min(size) < minimum else None
    edge = math.isqrt(int(minimum * 1e6)) if rule.square else 0
    if size.area < minimum * 1e6 or min(size) < edge:
        return f"below {minimum:g} megapixels: {size}" + (", whose largest square is smaller" if size.area >= minimum * 1e6 else "")
    return None


def plan(datasets: Sequence[DatasetColumns]) -> BucketPlan:
    """The cuts of all images of all data sets. None is dropped; a shape may hold a single sample."""
    parts = [_part(index, dataset) for index, dataset in enumerate(datasets)]
    targets = np.concatenate([target for _, target in parts]) if parts else np.empty(0, np.int64)
    shapes, shape_index = np.unique(targets, return_inverse=True)
    columns = np.concatenate([rows for rows, _ in parts]) if parts else np.empty(0, ROW)
    columns["shape"] = shape_index
    return BucketPlan(
        datasets=tuple(dataset.dataset for dataset in datasets),
        shapes=tuple(Size(int(shape) >> 32, int(shape) & 0xFFFFFFFF) for shape in shapes),
        columns=columns,
    )


def _part(index: int, dataset: DatasetColumns) -> tuple[NDArray[Any], Integers]:
    """The plan rows of one data set, and each row's target as one number (width * 2^32 + height) that sorts like the size."""
    rule, width, height = dataset.rule, dataset.width.astype(np.int64), dataset.height.astype(np.int64)
    if rule.style == "random" and (dataset.crop_u is None or dataset.crop_v is None):
        raise ValueError(f"data set {dataset.dataset!r} crops at random but was given no draws")
    columns = np.zeros(len(width), ROW)
    rw, rh, top, left, tw, th = _cuts(width, height, rule, dataset.crop_u, dataset.crop_v)
    columns["row"], columns["dataset"] = dataset.rows, index
    columns["width"], columns["height"] = width, height
    columns["resized_width"], columns["resized_height"] = rw, rh
    columns["top"], columns["left"] = top, left
    columns["upscaled"] = rw * rh > width * height
    if dataset.flip is not None:
        columns["flip"] = dataset.flip
    return columns, (tw << 32) | th


def _targets(width: Integers, height: Integers, rule: ResolutionRule) -> tuple[Integers, Integers]:
    aspect = np.ones(len(width)) if rule.square else width / height
    if rule.resolution_type == "area":
        edge = math.sqrt(rule.resolution * 1e6)
        wide, high = edge * np.sqrt(aspect), edge / np.sqrt(aspect)
    else:
        wide, high = rule.resolution * np.maximum(aspect, 1.0), rule.resolution / np.minimum(aspect, 1.0)
    return _aligned(wide, rule.alignment), _aligned(high, rule.alignment)


def _aligned(edge: NDArray[np.float64], alignment: int) -> Integers:
    """The nearest multiple of the alignment, a half upwards, and at least one of them."""
    return np.maximum(np.floor(edge / alignment + 0.5).astype(np.int64), 1) * alignment


def _cuts(
    width: Integers, height: Integers, rule: ResolutionRule, u: NDArray[np.float64] | None, v: NDArray[np.float64] | None
) -> tuple[Integers, Integers, Integers, Integers, Integers, Integers]:
    """Resized width and height, top and left of the cut, target width and height."""
    target_width, target_height = _targets(width, height, rule)
    # The edge that needs the larger factor becomes the target's, the other follows, rounded: integers, so nothing depends on the machine.
    by_width = target_width * height >= target_height * width
    resized_width = np.where(by_width, target_width, np.maximum(target_width, _divided(width * target_height, height)))
    resized_height = np.where(by_width, np.maximum(target_height, _divided(height * target_width, width)), target_height)
    spare_width, spare_height = resized_width - target_width, resized_height - target_height
    if rule.style == "center":
        top, left = spare_height // 2, spare_width // 2
    elif rule.style == "corner":
        top, left = spare_height, spare_width
    else:
        assert u is not None and v is not None
        top, left = _fraction(v, spare_height), _fraction(u, spare_width)
    return resized_width, resized_height, top, left, target_width, target_height


def _divided(numerator: Integers, denominator: Integers) -> Integers:
    """The quotient to the nearest integer, a half upwards."""
    return (2 * numerator + denominator) // (2 * denominator)


def _fraction(fraction: NDArray[np.float64], spare: Integers) -> Integers:
    """One of the spare + 1 positions, all equally likely for a uniform fraction in [0, 1)."""
    return np.minimum(np.floor(fraction * (spare + 1)).astype(np.int64), spare)
