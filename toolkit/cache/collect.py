"""What no run needs any more, and how it goes: whole shards are removed, shards of which something is needed are written anew."""

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
    """A file of a cache that holds more than is needed."""

    path: Path
    records: int  # that are not needed
    bytes: int  # that would be free
    kept: int  # records that are needed, and stay

    def __str__(self) -> str:
        what = f"{self.records:,} of {self.records + self.kept:,} records" if self.kept else f"all {self.records:,} records"
        return f"{self.path}: {what}, {self.bytes / 1e6:,.2f} MB"


def surplus(folder: Path, needed: Collection[bytes]) -> list[Surplus]:
    """The shards of a cache that hold records whose key is not needed, and those that the index does not know.

    DataError where the index cannot be read; and where there are records, and not one of them is needed: then it is more likely that the
    runs, the model or the device are not those that the cache was made with.
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
                f"{folder}: not one of the {len(needed):,} records that the runs need is among the {total:,} that are there; nothing is"
                " removed, since the cache seems to be another run's, or made for another model, size or device."
            )
        found += [stray for path in view.strays() if (stray := _stray(view, path, needed)) is not None]
    return found


def _stray(view: CacheView, path: Path, needed: Collection[bytes]) -> Surplus | None:
    """A shard that the index does not know, unless it is being written or a run would take something of it in."""
    with unused_file(path) as is_abandoned:
        if not is_abandoned:
            return None
        size, keys = path.stat().st_size, set[bytes]()
        if not path.name.endswith(UNSEALED):
            with contextlib.suppress(DamagedShardError):  # such a one is of no use to anybody
                keys = {placed.key for placed in read_header(path)}
        wanted = {key for key in keys if key in needed and view.find(key) is None}
    return None if wanted else Surplus(path, len(keys), size, 0)


def remove(folder: Path, needed: Mapping[bytes, str], progress: Callable[[int], None]) -> None:
    """Remove what `surplus` lists. DataError while a run has the cache open; `progress` is told of every shard that is done."""
    if not is_cache(folder):  # and opening it would make it one
        return
    cache = Cache(folder)  # takes in whole strays and removes broken ones, as for a run
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
    """What several runs need of each folder."""
    joined: dict[Path, dict[bytes, str]] = {}
    for need in needs:
        for folder, keys in need.items():
            joined.setdefault(folder.resolve(), {}).update(keys)
    return joined
