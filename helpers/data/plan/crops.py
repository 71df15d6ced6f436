"""How every image is resized and cropped to its training size. Pure arithmetic.

The aspect is kept. An image is resized once, to the smallest size that covers its training size, or, with `maximum_image_size`, to
`target_downsample_size`. What is outside the crop is lost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helpers.data.plan.targets import Fractions, Integers, ResolutionRule


class Places(NamedTuple):
    """What places the crops of N images; each array is needed only for the crop style that uses it.

    `crop_u` and `crop_v` in [0, 1) place a random crop horizontally and vertically. `face_x` and `face_y` in [0, 1] are the center of a
    face as a share of the image's width and height, NaN for an image without a face.
    """

    crop_u: Fractions | None = None
    crop_v: Fractions | None = None
    face_x: Fractions | None = None
    face_y: Fractions | None = None


class Crops(NamedTuple):
    """Sizes of the resized images, and the top left corners of the crops in them. Arrays (N,)."""

    resized_width: Integers
    resized_height: Integers
    top: Integers
    left: Integers


def crops(
    width: Integers, height: Integers, target_width: Integers, target_height: Integers, rule: ResolutionRule, places: Places
) -> Crops:
    """The crops of N images with these training sizes."""
    resized_width, resized_height = _covering(width, height, target_width, target_height)
    if rule.crop and rule.maximum_image_size:
        shrunk_width, shrunk_height = _shrunk(width, height, rule)
        downsampled = _is_larger(width, height, rule) & (shrunk_width >= target_width) & (shrunk_height >= target_height)
        resized_width = np.where(downsampled, shrunk_width, resized_width)
        resized_height = np.where(downsampled, shrunk_height, resized_height)
    left = _start(resized_width, target_width, rule, places.crop_u, places.face_x)
    top = _start(resized_height, target_height, rule, places.crop_v, places.face_y)
    return Crops(resized_width, resized_height, top, left)


def _covering(width: Integers, height: Integers, target_width: Integers, target_height: Integers) -> tuple[Integers, Integers]:
    """The smallest sizes with the images' aspects that cover the training sizes."""
    # One edge gets exactly its training size, the other follows. Integer arithmetic, so the result is the same on every machine.
    by_width = target_width * height >= target_height * width
    resized_width = np.where(by_width, target_width, np.maximum(target_width, _divided(width * target_height, height)))
    resized_height = np.where(by_width, np.maximum(target_height, _divided(height * target_width, width)), target_height)
    return resized_width, resized_height


def _is_larger(width: Integers, height: Integers, rule: ResolutionRule) -> NDArray[np.bool_]:
    """Which images are above `maximum_image_size`."""
    if rule.resolution_type == "area":
        return width * height > rule.maximum_image_size * 1e6
    return np.minimum(width, height) > rule.maximum_image_size


def _shrunk(width: Integers, height: Integers, rule: ResolutionRule) -> tuple[Integers, Integers]:
    """The sizes of the images at `target_downsample_size`, each edge rounded to a pixel."""
    if rule.resolution_type == "area":
        factor = np.sqrt(rule.target_downsample_size * 1e6 / (width * height))
    else:
        factor = rule.target_downsample_size / np.minimum(width, height)
    return np.floor(width * factor + 0.5).astype(np.int64), np.floor(height * factor + 0.5).astype(np.int64)


def _start(resized: Integers, target: Integers, rule: ResolutionRule, u: Fractions | None, face: Fractions | None) -> Integers:
    """The first pixel of the crop along one edge."""
    spare = resized - target
    if rule.style == "corner":
        return spare
    if rule.style == "random":
        assert u is not None
        return _fraction(u, spare)
    if rule.style == "face":
        assert face is not None
        around = np.floor(np.nan_to_num(face) * resized - target / 2 + 0.5).astype(np.int64)
        return np.where(np.isnan(face), spare // 2, np.clip(around, 0, spare))
    return spare // 2


def _divided(numerator: Integers, denominator: Integers) -> Integers:
    """The quotient rounded to an integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _fraction(fraction: Fractions, spare: Integers) -> Integers:
    """A position in 0 .. spare; all are equally likely for a uniform fraction in [0, 1)."""
    return np.minimum(np.floor(fraction * (spare + 1)).astype(np.int64), spare)
