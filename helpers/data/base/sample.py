"""What an image is and how it is cut: the records that everything in `data` passes around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


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
    """One image of one data set, with the captions it can be trained under."""

    dataset: str  # id of the data set
    key: str  # path relative to the data set's root, with "/"
    size: Size  # as shown, that is after EXIF rotation
    captions: tuple[str, ...]  # at least one; one that stands twice is drawn twice as often


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an image becomes training pixels: the whole is resized to `resized`, then `target` is cut at (top, left).

    `flip` mirrors the resized image left to right before the cut, so `left` counts in the mirrored image.
    """

    original: Size  # after EXIF rotation, before any resizing
    resized: Size
    top: int  # 0 <= top <= resized.height - target.height
    left: int  # 0 <= left <= resized.width - target.width
    target: Size
    flip: bool = False


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that is not trained on, and why, in words for the user."""

    key: str
    reason: str
