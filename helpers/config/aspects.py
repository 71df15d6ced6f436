"""Shapes that a user names: the aspects to draw from, and the sizes a bucket is given in place of the computed one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from helpers.config.json_file import read_json
from helpers.errors import ConfigError

LARGEST_MEGAPIXELS = 32  # nobody trains above it
LARGEST_ASPECT = 50  # as wide or as narrow as a picture may be; data leaves out what is thinner
LARGEST_WEIGHT = 1_000_000
DEFAULT_ROUNDING = 2  # decimals of a bucket's name
_MAP = "aspect_resolution_map-"


class AspectBucket(NamedTuple):
    """A shape to draw: width / height, and how often beside the others."""

    aspect: float
    weight: float = 1.0


class BucketSize(NamedTuple):
    """The size in pixels of the bucket whose computed width / height is `aspect` when rounded."""

    aspect: float
    width: int
    height: int


def aspect_bucket(raw: Any) -> AspectBucket:
    """An element of crop_aspect_buckets, `1.5` or `{"aspect": 1.5, "weight": 2}`; ValueError says what is wrong with it."""
    if not isinstance(raw, dict):
        return AspectBucket(_aspect(raw))
    unknown = raw.keys() - {"aspect", "weight"}
    if unknown or "aspect" not in raw:
        said = f"has the key {min(unknown)!r}" if unknown else 'has no "aspect"'
        raise ValueError(f'{said}; write a number, or {{"aspect": 1.5, "weight": 2}}')
    weight = raw.get("weight", 1)
    if not _is_number(weight) or not 0 < weight <= LARGEST_WEIGHT:
        raise ValueError(f"has the weight {weight!r}; it must be a number above 0 and at most {LARGEST_WEIGHT}")
    return AspectBucket(_aspect(raw["aspect"]), float(weight))


def _aspect(raw: Any) -> float:
    if not _is_number(raw):
        raise ValueError(f'has the aspect {raw!r}; write width / height as a number, such as 1.5, or {{"aspect": 1.5, "weight": 2}}')
    if not 1 / LARGEST_ASPECT <= raw <= LARGEST_ASPECT:
        raise ValueError(f"has the aspect {raw}; width / height must be between {1 / LARGEST_ASPECT:g} and {LARGEST_ASPECT}")
    return float(raw)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_number(raw: Any) -> bool:
    return isinstance(raw, int | float) and not isinstance(raw, bool)


def maps_in(output_dir: Path) -> dict[Path, float | None]:
    """The user's files of sizes, and the resolution that each is for; None where its name holds no number."""
    if not os.path.isdir(output_dir):  # false of a name too long as well, where pathlib raises
        return {}
    found = sorted(path for path in output_dir.glob(f"{_MAP}*.json") if path.is_file())
    return {path: _number(path.stem.removeprefix(_MAP)) for path in found}


def map_of(output_dir: Path, resolution: float) -> Path | None:
    """The user's file of sizes for a resolution, or None. ConfigError where there are two: `...-1.json` and `...-1.0.json` are one."""
    found = [path for path, number in maps_in(output_dir).items() if number == resolution]
    if len(found) > 1:
        raise ConfigError(f"{found[0]} and {found[1]} are for the same resolution; remove one.")
    return found[0] if found else None


def read_map(path: Path, alignment: int, rounding: int) -> tuple[BucketSize, ...]:
    """The sizes in an aspect_resolution_map file. ConfigError holds every mistake, with its line."""
    document = read_json(path)
    if not isinstance(document.value, dict):
        raise ConfigError(f'{path}: must hold an object such as {{"1.46": [1216, 832]}}.')
    sizes: dict[float, BucketSize] = {}
    problems = []
    for name, size in document.value.items():
        try:
            entry = _bucket_size(name, size, alignment, rounding)
            if entry.aspect in sizes:
                raise ValueError("says the same aspect a second time; remove one")
            sizes[entry.aspect] = entry
        except ValueError as error:
            problems.append(f'"{name}" {error} ({document.where((name,))}).')
    if problems:
        raise ConfigError(*problems)
    return tuple(sizes[aspect] for aspect in sorted(sizes))


def _bucket_size(name: str, size: Any, alignment: int, rounding: int) -> BucketSize:
    aspect = _number(name)
    if aspect is None:
        raise ValueError("is no aspect; write width / height as a number in quotes")
    if not 1 / LARGEST_ASPECT <= aspect <= LARGEST_ASPECT:
        raise ValueError(f"is not an aspect ratio of an image; width / height is between {1 / LARGEST_ASPECT:g} and {LARGEST_ASPECT}")
    if round(aspect, rounding) != aspect:
        raise ValueError(f"has more than {rounding} decimals and would fit no bucket; round it, or raise --aspect_bucket_rounding")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(edge, int) and not isinstance(edge, bool) for edge in size)):
        raise ValueError("must have a size such as [1216, 832]: width and height in pixels")
    width, height = size
    if min(size) < alignment or width % alignment or height % alignment:
        raise ValueError(f"has the size {width}x{height}; both sides must be multiples of {alignment}")
    if width * height > LARGEST_MEGAPIXELS * 1e6:
        raise ValueError(f"has the size {width}x{height}; nothing is trained above {LARGEST_MEGAPIXELS} megapixels")
    if max(size) > LARGEST_ASPECT * min(size):
        raise ValueError(f"has the size {width}x{height}; one side is more than {LARGEST_ASPECT} times the other")
    return BucketSize(aspect, width, height)
