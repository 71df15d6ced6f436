"""The training size of every image (its aspect bucket), from the image's size and the dataset's settings. Pure arithmetic.

    target_size(Size(1920, 1080), ResolutionRule(resolution=1.0))  # 1344x768: the aspect kept, about one megapixel, multiples of 64

The training size depends on the image and its dataset's settings only, and for random aspects on the image's own random number. Adding or
removing other images changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from helpers.config.aspects import DEFAULT_ROUNDING, LARGEST_ASPECT, AspectBucket, BucketSize
from helpers.data.base.sample import Size

MAX_ASPECT = LARGEST_ASPECT  # longer side / shorter side; a thinner image would be enlarged beyond memory to cover any training size

Integers = NDArray[np.int64]
Fractions = NDArray[np.float64]
CropStyle = Literal["center", "corner", "face", "random"]
CropAspect = Literal["square", "preserve", "random"]


@dataclass(frozen=True)
class ResolutionRule:
    """A dataset's settings for size and crop. The names are those of the dataloader JSON, where DATALOADER.md explains them.

    `resolution` is in megapixels (1.0 = 10^6 pixels) if `resolution_type` is area, else it is the shorter edge in pixels. The three
    `..._size` settings have the same unit; 0 means not set. Without `crop`, the crop is central and only aligns the size. With `crop`, it
    follows `crop_style` (corner is bottom right) and `crop_aspect`; random aspects are drawn from `aspect_buckets`. Images above
    `maximum_image_size` are first resized to `target_downsample_size`. `bucket_sizes` replaces the training sizes whose aspect, rounded to
    `rounding` decimals, equals theirs; only for area.
    """

    resolution: float = 1.0
    resolution_type: Literal["area", "pixel"] = "area"
    alignment: int = 64  # both edges of a training size are multiples of this, in pixels
    crop: bool = False
    crop_style: CropStyle = "random"
    crop_aspect: CropAspect = "square"
    aspect_buckets: tuple[AspectBucket, ...] = ()
    minimum_image_size: float = 0
    maximum_image_size: float = 0
    target_downsample_size: float = 0
    minimum_aspect: float = 0  # width / height
    maximum_aspect: float = math.inf
    bucket_sizes: tuple[BucketSize, ...] = ()
    rounding: int = DEFAULT_ROUNDING

    @property
    def style(self) -> CropStyle:
        """Where the crop is placed."""
        return self.crop_style if self.crop else "center"

    @property
    def square(self) -> bool:
        """Whether every training size is square, whatever the image's aspect."""
        return self.crop and self.crop_aspect == "square"

    @property
    def draws_aspect(self) -> bool:
        """Whether the aspect of the training size is random."""
        return self.crop and self.crop_aspect == "random"


def target_size(size: Size, rule: ResolutionRule, aspect_u: float = 0.5) -> Size:
    """The training size of one image: its aspect at the rule's resolution, each edge rounded to a multiple of the alignment.

    `aspect_u` in [0, 1) chooses the aspect if it is random.
    """
    width, height = targets(np.array([size.width]), np.array([size.height]), rule, np.array([aspect_u]))
    return Size(int(width[0]), int(height[0]))


def targets(width: Integers, height: Integers, rule: ResolutionRule, aspect_u: Fractions | None = None) -> tuple[Integers, Integers]:
    """Training widths and heights of N images, all arrays (N,). `aspect_u` in [0, 1) is needed only if `rule.draws_aspect`."""
    if rule.draws_aspect:
        assert aspect_u is not None
        return _random_aspects(width, height, rule, aspect_u)
    return _of_aspects(np.ones(len(width)) if rule.square else width / height, rule)


def unsuitable_size(size: Size, rule: ResolutionRule) -> str | None:
    """The reason why an image has a size or an aspect that is not trained on, as "kind: detail", or None.

    A minimum in pixels applies to the shorter edge. A minimum in megapixels applies to the area, and for square crops also to the largest
    square in the image.
    """
    if max(size) > MAX_ASPECT * min(size):
        return f"too narrow: {size}, one side is more than {MAX_ASPECT} times the other"
    aspect = size.width / size.height
    if aspect < rule.minimum_aspect:
        return f"aspect below {rule.minimum_aspect:g}: {size}, width / height is {aspect:.2f}"
    if aspect > rule.maximum_aspect:
        return f"aspect above {rule.maximum_aspect:g}: {size}, width / height is {aspect:.2f}"
    minimum = rule.minimum_image_size
    if rule.resolution_type == "pixel":
        return f"below {minimum:g} px: {size}" if min(size) < minimum else None
    edge = math.isqrt(int(minimum * 1e6)) if rule.square else 0
    if size.area < minimum * 1e6 or min(size) < edge:
        return f"below {minimum:g} megapixels: {size}" + (", whose largest square is smaller" if size.area >= minimum * 1e6 else "")
    return None


def _of_aspects(aspect: Fractions, rule: ResolutionRule) -> tuple[Integers, Integers]:
    """The training sizes for these aspects (width / height)."""
    if rule.resolution_type == "area":
        edge = math.sqrt(rule.resolution * 1e6)
        wide, high = edge * np.sqrt(aspect), edge / np.sqrt(aspect)
    else:
        wide, high = rule.resolution * np.maximum(aspect, 1.0), rule.resolution / np.minimum(aspect, 1.0)
    return _replaced(_aligned(wide, rule.alignment), _aligned(high, rule.alignment), rule)


def _aligned(edge: Fractions, alignment: int) -> Integers:
    """Rounded to a multiple of the alignment, halves up, and at least the alignment."""
    return np.maximum(np.floor(edge / alignment + 0.5).astype(np.int64), 1) * alignment


def _replaced(width: Integers, height: Integers, rule: ResolutionRule) -> tuple[Integers, Integers]:
    """Training sizes after `bucket_sizes`. Few of them are distinct, so each distinct one is looked up once."""
    if not rule.bucket_sizes or rule.resolution_type != "area":
        return width, height
    wanted = {size.aspect: (size.width, size.height) for size in rule.bucket_sizes}
    computed, which = np.unique((width << 32) | height, return_inverse=True)  # packed into one number: sorting pairs is slow
    pairs = [(int(packed) >> 32, int(packed) & 0xFFFFFFFF) for packed in computed]
    used = np.array([wanted.get(round(w / h, rule.rounding), (w, h)) for w, h in pairs], np.int64).reshape(-1, 2)
    return used[which, 0], used[which, 1]


def _random_aspects(width: Integers, height: Integers, rule: ResolutionRule, aspect_u: Fractions) -> tuple[Integers, Integers]:
    """For each image one of the `aspect_buckets`, by weight, of those it fills without enlargement; of all if it fills none."""
    wide, high = _of_aspects(np.array([bucket.aspect for bucket in rule.aspect_buckets]), rule)
    fits = [(w <= width) & (h <= height) for w, h in zip(wide, high, strict=True)]
    none_fits = ~np.logical_or.reduce(fits)
    shares = [bucket.weight * (fit | none_fits) for bucket, fit in zip(rule.aspect_buckets, fits, strict=True)]
    total = np.sum(shares, axis=0)
    drawn = np.minimum(aspect_u * total, np.nextafter(total, 0))  # the product may round up to the total, which no bucket covers
    cumulative, chosen = np.zeros(len(width)), np.full(len(width), -1)
    for index, share in enumerate(shares):
        cumulative = cumulative + share
        chosen[(chosen < 0) & (drawn < cumulative)] = index
    return wide[chosen], high[chosen]
