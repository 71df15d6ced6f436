"""Garbage collection: shards that no run needs are deleted, and shards that are partly needed are rewritten."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from helpers.data.cache.cache import Cache
from helpers.data.cache.shards import UNSEALED, DamagedShardError, read_header, unused_file
from helpers.errors import DataError
from toolkit.cache.view import CacheView, is_cache


@dataclass(frozen=True)
class Surplus:
    """A shard with records that are not needed."""

    path: Path
    records: int  # records that are not needed
    bytes: int  # that deleting them frees
    kept: int  # records that are needed

    def __str__(self) -> str:
        what = f"{self.records:,} of {self.records + self.kept:,} records" if self.kept else f"all {self.records:,} records"
        return f"{self.path}: {what}, {self.bytes / 1e6:,.2f} MB"


def surplus(folder: Path, needed: Collection[bytes]) -> list[Surplus]:
    """The shards of a cache with records whose key is not needed, and the shards that are not in the index.

    DataError if the index cannot be read. DataError also if there are records and none of them is needed: then the cache was probably
    made with other runs, another model or another device.
    """
    if not is_cache(folder):
        return []
    with CacheView(folder) as view:
        found, present, total = [], 0, 0
        for shard in view.shards():
            records = view.records(shard)
            unneeded = [record for record in records if record.key not in needed]
            present += len(records) - len(unneeded)
            total += len(records)
            if unneeded or not records:
                free = shard.size if len(unneeded) == len(records) else sum(record.size for record in unneeded)
                found.append(Surplus(folder / shard.name, len(unneeded), free, len(records) - len(unneeded)))
        if total and not present:
            raise DataError(
                f"{folder}: the runs need {len(needed):,} records, and none of them is among the {total:,} records here; nothing is"
                " removed, because the cache seems to belong to another run, or was made for another model, size or device."
            )
        found += [stray for path in view.strays() if (stray := _stray(view, path, needed)) is not None]
    return found


def _stray(view: CacheView, path: Path, needed: Collection[bytes]) -> Surplus | None:
    """A shard that is not in the index, unless it is being written or a run would add records of it to the index."""
    with unused_file(path) as is_abandoned:
        if not is_abandoned:
            return None
        size, keys = path.stat().st_size, set[bytes]()
        if not path.name.endswith(UNSEALED):
            with contextlib.suppress(DamagedShardError):  # a damaged shard is of no use
                keys = {placed.key for placed in read_header(path)}
        wanted = {key for key in keys if key in needed and view.find(key) is None}
    return None if wanted else Surplus(path, len(keys), size, 0)


def remove(folder: Path, needed: Mapping[bytes, str], progress: Callable[[int], None]) -> None:
    """Delete what `surplus` lists. `progress(1)` is called after every shard. DataError while a run has the cache open."""
    if not is_cache(folder):  # opening it would create a cache
        return
    cache = Cache(folder)  # adds intact shards to the index and deletes broken ones, as for a run
    try:
        cache.lock_exclusively()
        for found in surplus(folder, needed):
            cache.keep_only(found.path.name, needed)
            progress(1)
        with CacheView(folder) as view:
            subjects = set(needed.values())
            forgotten = [subject for subject, _ in view.origins() if subject not in subjects]
        cache.remove_origins(forgotten)
    finally:
        cache.close()


def together(needs: Iterator[Mapping[Path, Mapping[bytes, str]]]) -> dict[Path, dict[bytes, str]]:
    """The records of each folder that at least one of several runs needs."""
    joined: dict[Path, dict[bytes, str]] = {}
    for need in needs:
        for folder, keys in need.items():
            joined.setdefault(folder.resolve(), {}).update(keys)
    return joined
