"""The records that the data room gives to reporters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.data.base.sample import Geometry


@dataclass(frozen=True)
class Thumbnail:
    """One image as it is trained, small. `jpeg` is empty where the image cannot be decoded; `problem` gives the reason."""

    dataset: str
    key: str
    caption: str
    geometry: Geometry
    upscaled: bool
    jpeg: bytes = b""
    problem: str = ""


@dataclass(frozen=True)
class Survey:
    """The state of the data at the start of a run. `thumbnails` reads a bounded number of files when a reporter calls it."""

    report: dict[str, Any]  # the content of dataset_report.json
    thumbnails: Callable[[], Sequence[Thumbnail]]
