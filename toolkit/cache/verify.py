"""Verify every byte of a cache."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers.data.cache.index import Shard
from helpers.data.cache.shards import UNSEALED, DamagedShardError, RecordEntry, parse_header, read_header, unpack, unused_file
from helpers.data.encode.common import is_finite
from helpers.data.sources import CachePlace
from helpers.errors import DataError
from toolkit.cache.view import CacheView, view_of


def verify(place: CachePlace, progress: Callable[[int], None]) -> Iterator[str]:
    """One sentence for every problem of a cache. `progress` gets the bytes of each finished shard.

    It compares the index with the files, each shard's size and header with the index, and each record's bytes with its checksum; and it
    checks that all values are finite. Shards in a bucket without a local copy are read from the bucket, or skipped if the place has no
    connection to it. A shard that a running process is writing is skipped.
    """
    try:
        view = view_of(place)
    except DataError as error:
        yield str(error)
        return
    with view:
        skipped = set(view.elsewhere()) if view.store is None else ()
        for shard in view.shards():
            if shard not in skipped:
                yield from _shard(view, shard)
            progress(shard.size)
        for path in view.strays():
            yield from _stray(path)


def _shard(view: CacheView, shard: Shard) -> Iterator[str]:
    path = view.place_of(shard)
    records = view.records(shard)
    stream = view.whole(shard)
    if stream is None:
        yield f"{path} is missing; it held {len(records):,} records"
        return
    with stream:
        if (size := stream.seek(0, os.SEEK_END)) != shard.size:
            yield f"{path} has {size:,} bytes instead of {shard.size:,}"
            return
        stream.seek(0)
        try:
            written = {placed.key: placed for placed in parse_header(stream, size)}
        except DamagedShardError as error:
            yield f"{path}: {error}"
            written = {}
        for placed in records:
            if not placed.layout:
                yield f"{path}: record {placed.key.hex()} has a damaged entry in the index; the next run encodes it again"
                continue
            if written and written.get(placed.key) != placed:
                yield f"{path}: record {placed.key.hex()} is not at the position in the index"
                continue
            stream.seek(placed.offset)
            payload = bytearray(stream.read(placed.size))
            if zlib.crc32(payload) != placed.crc:
                yield f"{path}: record {placed.key.hex()} has changed since it was written ({_place(placed)})"
            elif not is_finite(unpack(placed.layout, payload)):
                yield f"{path}: record {placed.key.hex()} contains values that are not finite ({_place(placed)})"


def _place(placed: RecordEntry) -> str:
    return f"bytes {placed.offset:,} to {placed.offset + placed.size - 1:,}"


def _stray(path: Path) -> Iterator[str]:
    with unused_file(path) as is_abandoned:
        if not is_abandoned:
            return
        if path.name.endswith(UNSEALED):
            yield f"{path} was never finished; the next run deletes it"
            return
        try:
            records = len(read_header(path))
        except DamagedShardError as error:
            yield f"{path} is not in the index, and {error}; the next run deletes it"
        else:
            yield f"{path} is not in the index; the next run adds its {records:,} records"
