"""Records that all of `data` uses: an image with its captions, its size and crop, and a file that is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# Roles of companions: other images that belong to an image (encode/companions.py). In the order in which records and hashes have them.
CONDITION, MASK = "condition", "mask"
ROLES = (CONDITION, MASK)


class Size(NamedTuple):
    """Width and height in pixels, written `WxH`."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def area(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of one dataset, with the captions it may be trained with."""

    dataset: str  # id of the dataset
    key: str  # path relative to the dataset's root, with "/"
    size: Size  # after EXIF rotation
    captions: tuple[str, ...]  # at least one; a caption that appears twice is drawn twice as often


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an image becomes training pixels: resize it to `resized`, mirror it if `flip`, then crop `target` at (top, left).

    The crop comes after the mirroring, so `left` counts in the mirrored image.
    """

    original: Size  # after EXIF rotation, before any resizing
    resized: Size
    top: int  # 0 <= top <= resized.height - target.height
    left: int  # 0 <= left <= resized.width - target.width
    target: Size
    flip: bool = False


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that is not trained on, with the reason as "kind: detail", in words for the user."""

    key: str
    reason: str
