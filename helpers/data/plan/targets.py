"""Which size every image is trained at: sizes and rules in, target sizes out. Pure arithmetic.

The target depends on the image's own size, on the rule of its data set and, where the shape is drawn, on its own number alone; so
adding or removing other images changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from helpers.config.aspects import DEFAULT_ROUNDING, LARGEST_ASPECT, AspectBucket, BucketSize
from helpers.data.base.sample import Size

MAX_ASPECT = LARGEST_ASPECT  # beyond this, a picture is a line: covering even the thinnest target would blow it up out of memory

Integers = NDArray[np.int64]
Fractions = NDArray[np.float64]
CropStyle = Literal["center", "corner", "face", "random"]
CropAspect = Literal["square", "preserve", "random"]


@dataclass(frozen=True)
class ResolutionRule:
    """What a data set says of sizes and cuts.

    `resolution` is megapixels (1.0 = 10^6 pixels) when `resolution_type` is area, else the shorter edge in pixels; the three sizes
    below it have the same unit. With `crop` off the cut is central and serves alignment only; with `crop` on it follows `crop_style`
    (corner is bottom right) and `crop_aspect`, whose random draws from `aspect_buckets`, and images above `maximum_image_size` are
    shrunk to `target_downsample_size` before the cut. 0 stands for no minimum and no maximum. `bucket_sizes` replace the computed
    targets whose aspect, rounded to `rounding` decimals, is theirs; only with area.
    """

    resolution: float = 1.0
    resolution_type: Literal["area", "pixel"] = "area"
    alignment: int = 64  # target edges are multiples of this many pixels
    crop: bool = False
    crop_style: CropStyle = "random"
    crop_aspect: CropAspect = "square"
    aspect_buckets: tuple[AspectBucket, ...] = ()
    minimum_image_size: float = 0
    maximum_image_size: float = 0
    target_downsample_size: float = 0
    bucket_sizes: tuple[BucketSize, ...] = ()
    rounding: int = DEFAULT_ROUNDING

    @property
    def style(self) -> CropStyle:
        """Where the cut is made."""
        return self.crop_style if self.crop else "center"

    @property
    def square(self) -> bool:
        """Whether every target is square, whatever the image's aspect."""
        return self.crop and self.crop_aspect == "square"

    @property
    def draws_aspect(self) -> bool:
        """Whether the shape of an image's target is drawn."""
        return self.crop and self.crop_aspect == "random"


def target_size(size: Size, rule: ResolutionRule, aspect_u: float = 0.5) -> Size:
    """The training size of an image: its aspect at the rule's resolution, each edge to the nearest multiple of the alignment.

    `aspect_u` in [0, 1) draws the aspect where the rule does not take the image's own.
    """
    width, height = targets(np.array([size.width]), np.array([size.height]), rule, np.array([aspect_u]))
    return Size(int(width[0]), int(height[0]))


def targets(width: Integers, height: Integers, rule: ResolutionRule, aspect_u: Fractions | None = None) -> tuple[Integers, Integers]:
    """(N,) widths and heights of images => those of their targets. `aspect_u` (N,) is needed only where `rule.draws_aspect`."""
    if rule.draws_aspect:
        assert aspect_u is not None
        return _drawn(width, height, rule, aspect_u)
    return _of_aspects(np.ones(len(width)) if rule.square else width / height, rule)


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


def _of_aspects(aspect: Fractions, rule: ResolutionRule) -> tuple[Integers, Integers]:
    """The targets of pictures of these aspects."""
    if rule.resolution_type == "area":
        edge = math.sqrt(rule.resolution * 1e6)
        wide, high = edge * np.sqrt(aspect), edge / np.sqrt(aspect)
    else:
        wide, high = rule.resolution * np.maximum(aspect, 1.0), rule.resolution / np.minimum(aspect, 1.0)
    return _in_place(_aligned(wide, rule.alignment), _aligned(high, rule.alignment), rule)


def _aligned(edge: Fractions, alignment: int) -> Integers:
    """The nearest multiple of the alignment, a half upwards, and at least one of them."""
    return np.maximum(np.floor(edge / alignment + 0.5).astype(np.int64), 1) * alignment


def _in_place(width: Integers, height: Integers, rule: ResolutionRule) -> tuple[Integers, Integers]:
    """The sizes that the user wants in place of the computed ones. There are few different targets, so they are looked up one by one."""
    if not rule.bucket_sizes or rule.resolution_type != "area":
        return width, height
    wanted = {size.aspect: (size.width, size.height) for size in rule.bucket_sizes}
    computed, which = np.unique((width << 32) | height, return_inverse=True)  # as one number each: sorting pairs is slow
    pairs = [(int(packed) >> 32, int(packed) & 0xFFFFFFFF) for packed in computed]
    used = np.array([wanted.get(round(w / h, rule.rounding), (w, h)) for w, h in pairs], np.int64).reshape(-1, 2)
    return used[which, 0], used[which, 1]


def _drawn(width: Integers, height: Integers, rule: ResolutionRule, aspect_u: Fractions) -> tuple[Integers, Integers]:
    """A bucket for each image, by weight among those whose target it covers without being enlarged; among all where there is none."""
    wide, high = _of_aspects(np.array([bucket.aspect for bucket in rule.aspect_buckets]), rule)
    fits = [(w <= width) & (h <= height) for w, h in zip(wide, high, strict=True)]
    none_fits = ~np.logical_or.reduce(fits)
    shares = [bucket.weight * (fit | none_fits) for bucket, fit in zip(rule.aspect_buckets, fits, strict=True)]
    total = np.sum(shares, axis=0)
    drawn = np.minimum(aspect_u * total, np.nextafter(total, 0))  # the product may round up to the total, which is nobody's
    passed, chosen = np.zeros(len(width)), np.full(len(width), -1)
    for index, share in enumerate(shares):
        passed = passed + share
        chosen[(chosen < 0) & (drawn < passed)] = index
    return wide[chosen], high[chosen]
