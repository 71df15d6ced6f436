"""A read-only view of a cache on disk. (Opening a cache as a run does would repair it.)"""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from helpers.data.cache.cache import SHARD_NAME
from helpers.data.cache.index import INDEX, Shard, verified_layouts
from helpers.data.cache.shards import RecordEntry
from helpers.data.sources import CachePlace
from helpers.errors import DataError, StorageError
from helpers.storage.backend import SourceBackend

Read = TypeVar("Read")


class CacheView:
    """The index of a cache, read-only. DataError if it is missing or cannot be read.

    `store` reads the shards of a cache in a bucket; None if the bucket is not to be contacted. `stored_in` is the bucket's name in either
    case, and "" for a cache that is only on disk.
    """

    def __init__(self, folder: Path, store: SourceBackend | None = None) -> None:
        self.folder = folder
        self.store = store
        path = folder / INDEX
        if not path.is_file():
            raise DataError(f"{path} is missing; the next run rebuilds it from the shards.")
        try:
            self._index = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
            self._index.execute("BEGIN")  # a snapshot: what runs write meanwhile is not seen
            damage = self._index.execute("PRAGMA quick_check(1)").fetchone()[0]
            self._layouts = verified_layouts(self._index)
            self.stored_in = self._name_of_store()
        except sqlite3.Error as error:
            raise DataError(f"{path} cannot be read ({error}); the next run rebuilds it from the shards.") from error
        if damage != "ok":
            raise DataError(f"{path} is damaged ({damage}); delete it, and the next run rebuilds it from the shards.")

    def __enter__(self) -> CacheView:
        return self

    def __exit__(self, *exception: object) -> None:
        self._index.close()

    def shards(self) -> list[Shard]:
        """All shards, the oldest first."""
        return [Shard(*row) for row in self._index.execute("SELECT number, name, size FROM shards ORDER BY name")]

    def elsewhere(self) -> list[Shard]:
        """The shards of a cache in a bucket that have no local copy."""
        return [shard for shard in self.shards() if self.stored_in and not (self.folder / shard.name).is_file()]

    def _name_of_store(self) -> str:
        """ "" for an index that an older version made."""
        if not self._index.execute("SELECT 1 FROM sqlite_master WHERE name = 'stores'").fetchone():
            return ""
        return next((name for (name,) in self._index.execute("SELECT name FROM stores")), "")

    def records(self, shard: Shard) -> list[RecordEntry]:
        """The records of a shard according to the index, in the order of their bytes.

        The layout of a record is "" if the index has none with its number: then the record's row is damaged.
        """
        rows = self._index.execute("SELECT key, layout, offset, size, crc FROM records WHERE shard = ? ORDER BY offset", (shard.number,))
        return [RecordEntry(key, self._layouts.get(layout, ""), offset, size, crc) for key, layout, offset, size, crc in rows]

    def place_of(self, shard: Shard) -> str:
        """The location of a shard, for messages."""
        path = self.folder / shard.name
        return str(path) if self.store is None or path.is_file() else f"{self.store.name}{shard.name}"

    def whole(self, shard: Shard) -> BinaryIO | None:
        """A stream over a whole shard, from the bucket if there is no local copy; None if the shard does not exist."""
        path = self.folder / shard.name
        if path.is_file():
            return path.open("rb")
        return None if self.store is None else self._stored(self.store, shard, lambda store: io.BytesIO(store.read(shard.name)))

    def payload(self, shard: Shard, placed: RecordEntry) -> bytearray:
        """The bytes of a record; fewer if the shard is truncated or does not exist."""

        def read(stream: BinaryIO) -> bytearray:
            with stream:
                stream.seek(placed.offset)
                return bytearray(stream.read(placed.size))

        path = self.folder / shard.name
        if path.is_file():
            return read(path.open("rb"))
        found = None if self.store is None else self._stored(self.store, shard, lambda store: read(store.open(shard.name)))
        return found or bytearray()

    @staticmethod
    def _stored(store: SourceBackend, shard: Shard, read: Callable[[SourceBackend], Read]) -> Read | None:
        """Read a shard from the bucket; None if it does not exist there. StorageError if reading fails."""
        try:
            return read(store)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{store.name}: {shard.name} could not be read: {error.strerror or error}.") from error

    def find(self, key: bytes) -> tuple[Shard, RecordEntry] | None:
        """The shard of a record and its position there, with a layout as in `records`; None if there is no such record."""
        row = self._index.execute(
            "SELECT number, name, shards.size, layout, offset, records.size, crc FROM records JOIN shards ON shards.number = shard"
            " WHERE key = ?",
            (key,),
        ).fetchone()
        if row is None:
            return None
        return Shard(*row[:3]), RecordEntry(key, self._layouts.get(row[3], ""), *row[4:])

    def origin(self, subject: str) -> dict[str, str] | None:
        """What the latest record of a subject was made from; None if it has none."""
        row = self._index.execute("SELECT facts FROM origins WHERE subject = ?", (subject,)).fetchone()
        return json.loads(row[0]) if row else None

    def origins(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Every subject, with what its latest record was made from."""
        for subject, facts in self._index.execute("SELECT subject, facts FROM origins"):
            yield subject, json.loads(facts)

    def strays(self) -> list[Path]:
        """Shard files that are not in the index: left by killed processes, or being written."""
        known = {shard.name for shard in self.shards()}
        return [path for path in sorted(self.folder.iterdir()) if SHARD_NAME.fullmatch(path.name) and path.name not in known]


def view_of(place: CachePlace) -> CacheView:
    """The cache at one of a run's places. DataError as for CacheView."""
    return CacheView(place.folder, place.store())


def caches_below(folder: Path) -> list[Path]:
    """The caches in a folder: the folder itself and its subfolders, as deep as a run creates them (`s3/BUCKET-...`)."""
    candidates = [folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))] if folder.is_dir() else []
    return [path for path in candidates if is_cache(path)]


def is_cache(folder: Path) -> bool:
    """Whether a folder contains an index, or shards from which one can be rebuilt."""
    if (folder / INDEX).is_file():
        return True
    with contextlib.suppress(OSError):
        return any(SHARD_NAME.fullmatch(path.name) for path in folder.iterdir())
    return False
