"""Explain an image's cache entry: what it was made from, or why it must be encoded again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from helpers.data.cache.shards import RecordEntry
from helpers.data.encode.common import REASONS
from helpers.errors import DataError
from toolkit.cache.current_run import ImageEntry
from toolkit.cache.stats import shape_of
from toolkit.cache.view import CacheView, Shard, view_of

NAMES = {
    "image": "SHA-256 of the file, and of its conditioning image and mask if it has them",
    "encoder": "VAE: weights and their precision",
    "geometry": "resized size; top, left of the crop; training size; version of the image processing",
    "precision": "precision of the cache",
    "condition": "how the conditioning image is processed; version of the image processing",
    "mask": "what of the mask counts, its scale, version of the processing",
}


def explain(entry: ImageEntry) -> tuple[bool, list[str]]:
    """Whether the cache has the latents that the next start needs, undamaged, and the lines that explain it."""
    head = f"{entry.sample.key} of dataset {entry.sample.dataset}"
    if entry.epoch is not None:
        head += f", with its crop of epoch {entry.epoch},"
    if entry.left_out:
        return False, [f"{head} is left out: {entry.left_out}"]
    try:
        view = view_of(entry.cache)
    except DataError as error:
        return False, [f"{head}: {error}", *_facts(entry)]
    with view:
        found, earlier = view.find(entry.key), view.origin(entry.subject)
        if found is None:
            return False, [f"{head} is not in the cache: {_reason(entry, earlier)}", *_facts(entry), *_changed(entry, earlier)]
        whole = is_whole(view, *found)
        verdict = "is current: the next start uses this entry" if whole else "is damaged: the next start encodes it again"
        return whole, [f"{head} {verdict}", *_facts(entry), *_place(view, *found)]


def is_whole(view: CacheView, shard: Shard, placed: RecordEntry) -> bool:
    """Whether a record can be read: its layout is known, and its bytes match its checksum."""
    return bool(placed.layout) and zlib.crc32(view.payload(shard, placed)) == placed.crc


def _facts(entry: ImageEntry) -> Iterator[str]:
    yield f"  key       {entry.key.hex()}"
    for name, value in entry.facts.items():
        yield f"  {name:<9} {value} ({NAMES[name]})"


def _place(view: CacheView, shard: Shard, placed: RecordEntry) -> Iterator[str]:
    yield f"  shard     {view.place_of(shard)}, {placed.size:,} bytes from {placed.offset:,}"
    yield f"  holds     {shape_of(placed.layout)}"


def _reason(entry: ImageEntry, earlier: dict[str, str] | None) -> str:
    if earlier is None:
        return "it was never encoded"
    changed = [name for name, value in entry.facts.items() if earlier.get(name) != value]
    if not changed:
        return f"{REASONS['lost']}, or deleted from it"
    return "it was encoded with other settings or files (" + ", ".join(REASONS[name] for name in changed) + ")"


def _changed(entry: ImageEntry, earlier: dict[str, str] | None) -> Iterator[str]:
    for name, value in entry.facts.items():
        if earlier is not None and earlier.get(name) != value:
            yield f"  earlier   {name} {earlier.get(name)}"
