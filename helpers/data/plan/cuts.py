"""How every image is resized and where its target is cut out: sizes and targets in, integers out. Pure arithmetic.

An image keeps its aspect. It is resized once, so that it just covers its target, or to the size that the rule shrinks large images
to, and what sticks out is cut away.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helpers.data.plan.targets import Fractions, Integers, ResolutionRule


class Places(NamedTuple):
    """Numbers that place the cuts of N images, each needed only where a rule's style asks for it.

    `crop_u` and `crop_v` in [0, 1) place a random cut from left to right and from top to bottom. `face_x` and `face_y` in [0, 1] are
    the middle of a face, as a share of the picture from its left and its top, or NaN for a picture without one.
    """

    crop_u: Fractions | None = None
    crop_v: Fractions | None = None
    face_x: Fractions | None = None
    face_y: Fractions | None = None


class Cuts(NamedTuple):
    """(N,) sizes of whole resized pictures, and the top left corners of the cuts in them."""

    resized_width: Integers
    resized_height: Integers
    top: Integers
    left: Integers


def cuts(width: Integers, height: Integers, target_width: Integers, target_height: Integers, rule: ResolutionRule, places: Places) -> Cuts:
    """The cuts of targets from images of these sizes, all (N,)."""
    resized_width, resized_height = _covering(width, height, target_width, target_height)
    if rule.crop and rule.maximum_image_size:
        shrunk_width, shrunk_height = _shrunk(width, height, rule)
        taken = _is_larger(width, height, rule) & (shrunk_width >= target_width) & (shrunk_height >= target_height)
        resized_width = np.where(taken, shrunk_width, resized_width)
        resized_height = np.where(taken, shrunk_height, resized_height)
    left = _start(resized_width, target_width, rule, places.crop_u, places.face_x)
    top = _start(resized_height, target_height, rule, places.crop_v, places.face_y)
    return Cuts(resized_width, resized_height, top, left)


def _covering(width: Integers, height: Integers, target_width: Integers, target_height: Integers) -> tuple[Integers, Integers]:
    """The smallest sizes of the images' aspects that cover the targets."""
    # The edge that needs the larger factor becomes the target's, the other follows, rounded: integers, so nothing depends on the machine.
    by_width = target_width * height >= target_height * width
    resized_width = np.where(by_width, target_width, np.maximum(target_width, _divided(width * target_height, height)))
    resized_height = np.where(by_width, np.maximum(target_height, _divided(height * target_width, width)), target_height)
    return resized_width, resized_height


def _is_larger(width: Integers, height: Integers, rule: ResolutionRule) -> NDArray[np.bool_]:
    """Which images are above the rule's maximum."""
    if rule.resolution_type == "area":
        return width * height > rule.maximum_image_size * 1e6
    return np.minimum(width, height) > rule.maximum_image_size


def _shrunk(width: Integers, height: Integers, rule: ResolutionRule) -> tuple[Integers, Integers]:
    """The images at the size that those above the maximum are shrunk to, each edge to the nearest pixel."""
    if rule.resolution_type == "area":
        factor = np.sqrt(rule.target_downsample_size * 1e6 / (width * height))
    else:
        factor = rule.target_downsample_size / np.minimum(width, height)
    return np.floor(width * factor + 0.5).astype(np.int64), np.floor(height * factor + 0.5).astype(np.int64)


def _start(resized: Integers, target: Integers, rule: ResolutionRule, u: Fractions | None, face: Fractions | None) -> Integers:
    """Where along one edge the cut begins."""
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
    """The quotient to the nearest integer, a half upwards."""
    return (2 * numerator + denominator) // (2 * denominator)


def _fraction(fraction: Fractions, spare: Integers) -> Integers:
    """One of the spare + 1 positions, all equally likely for a uniform fraction in [0, 1)."""
    return np.minimum(np.floor(fraction * (spare + 1)).astype(np.int64), spare)
