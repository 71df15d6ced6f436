"""Why the latents of a picture are in the cache as they are, or why they have to be made."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from helpers.data.cache.shards import RecordEntry
from helpers.data.encode.fill import REASONS
from helpers.errors import DataError
from toolkit.cache.present import Picture
from toolkit.cache.stats import shape_of
from toolkit.cache.view import CacheView, Shard, view_of

NAMES = {
    "image": "SHA-256 of the file, and of its condition where it has one",
    "encoder": "codec: weights and their precision",
    "geometry": "resized; top, left of the cut; shape; version of our pixels",
    "precision": "of the cache",
    "condition": "what becomes of the condition; version of our pixels",
}


def explain(picture: Picture) -> tuple[bool, list[str]]:
    """Whether the latents that the next start needs are there and whole, and the lines that say so."""
    head = f"{picture.sample.key} of data set {picture.sample.dataset}"
    if picture.epoch is not None:
        head += f", as epoch {picture.epoch} cuts it,"
    if picture.left_out:
        return False, [f"{head} is left out: {picture.left_out}"]
    try:
        view = view_of(picture.cache)
    except DataError as error:
        return False, [f"{head}: {error}", *_facts(picture)]
    with view:
        found, earlier = view.find(picture.key), view.origin(picture.subject)
        if found is None:
            return False, [f"{head} is not in the cache: {_reason(picture, earlier)}", *_facts(picture), *_changed(picture, earlier)]
        whole = is_whole(view, *found)
        verdict = "is current: the next start uses it as it is" if whole else "is damaged: the next start makes it again"
        return whole, [f"{head} {verdict}", *_facts(picture), *_place(view, *found)]


def is_whole(view: CacheView, shard: Shard, placed: RecordEntry) -> bool:
    """Whether a record reads as it was written."""
    return zlib.crc32(view.payload(shard, placed)) == placed.crc


def _facts(picture: Picture) -> Iterator[str]:
    yield f"  key       {picture.key.hex()}"
    for name, value in picture.facts.items():
        yield f"  {name:<9} {value} ({NAMES[name]})"


def _place(view: CacheView, shard: Shard, placed: RecordEntry) -> Iterator[str]:
    yield f"  shard     {view.place_of(shard)}, {placed.size:,} bytes from {placed.offset:,}"
    yield f"  holds     {shape_of(placed.layout)}"


def _reason(picture: Picture, earlier: dict[str, str] | None) -> str:
    if earlier is None:
        return "it was never encoded"
    changed = [name for name, value in picture.facts.items() if earlier.get(name) != value]
    if not changed:
        return f"{REASONS['lost']}, or removed from it"
    return "it was encoded under other facts (" + ", ".join(REASONS[name] for name in changed) + ")"


def _changed(picture: Picture, earlier: dict[str, str] | None) -> Iterator[str]:
    for name, value in picture.facts.items():
        if earlier is not None and earlier.get(name) != value:
            yield f"  earlier   {name} {earlier.get(name)}"
