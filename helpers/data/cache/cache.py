"""Tensors under a key, in sealed shards with an index. What the index does not know does not exist.

Several processes of one machine may read and write one cache: each writer fills shards of its own, and a shard enters the index in one
commit after it is durable. A killed process loses its open shard and nothing else.

The first record of a key stays. Two identical images are encoded beside different neighbours and differ in the last bits, and which
of them a run trains on must not depend on when it was killed. To replace a record, discard it first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from torch import Tensor

from helpers.data.cache.index import CacheIndex, Locations, Shard
from helpers.data.cache.remote import RemoteShards
from helpers.data.cache.shards import (
    SUFFIX,
    UNSEALED,
    DamagedShardError,
    Packed,
    Placed,
    abandoned,
    map_file,
    pack,
    read_header,
    sealed_shard,
    unpack,
)
from helpers.errors import DataError, StorageError

IN_USE = ".in-use"  # locked by everybody who has the cache open
SHARD_BYTES = 64 * 2**20
SEAL_AFTER_SECONDS = 30.0  # unless the writer is told otherwise
SHARD_NAME = re.compile(rf"\d{{20}}-\d+-\d+-\d+{re.escape(SUFFIX)}({re.escape(UNSEALED)})?")
_MAPPED_SHARDS = 4096  # kept mapped at a time; the kernel allows a process 65,530 mappings


class DamagedRecordError(Exception):
    """A record that no longer reads as it was written; it can be discarded and made again. The message names its file."""


def record_key(*parts: str) -> bytes:
    """A key of 16 bytes that depends on every part and on where one ends and the next begins."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


class Cache:
    """The records in a folder. Safe to use from several threads.

    With `remote`, the shards are in a store and the folder holds the index and copies of some. `notes` tells, in words for the user,
    what was found amiss and put right when the cache was opened. StorageError, or DataError of a store that lets nobody in.
    """

    def __init__(self, folder: Path, remote: RemoteShards | None = None) -> None:
        self.folder = folder
        self.remote = remote
        self.notes: list[str] = []
        self.given_up = False
        self._lock = threading.Lock()
        self._maps: dict[int, memoryview] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: the cache folder cannot be made: {error.strerror}.") from error
        self._use = self._hold()
        self._index = CacheIndex(folder)
        if self._index.note:
            self.notes.append(self._index.note)
        self._index.note_store(remote.store.name if remote is not None else "")
        known = self._index.shards()
        stored = remote.listed() if remote is not None else {}  # after the index: what that knew has been uploaded
        self._drop_lost_shards(known, stored)
        self._take_in_strays(stored)
        if remote is not None:
            self._take_in_stored(remote, stored)

    def find(self, keys: Iterable[bytes]) -> Locations:
        """Where the records of the keys lie, in their order; field "shard" is 0 where a key has none."""
        return self._index.find(keys)

    def read(self, location: np.void) -> dict[str, Tensor]:
        """The tensors of a record, as copies. DamagedRecordError when they are not what was written."""
        shard, layout, offset, size, crc = location.item()
        if self.remote is None:
            payload = bytearray(self._mapped(shard)[offset : offset + size])
        else:
            copied = self._payload_of_copy(self.remote, shard, offset, size, crc)
            payload = self._payload_stored(self.remote, shard, offset, size, crc) if copied is None else copied
        if zlib.crc32(payload) != crc:
            raise DamagedRecordError(f"{self.folder / self._shard(shard).name}: a record has changed since it was written")
        return unpack(self._index.layout(layout), payload)

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors under a key, or None. DamagedRecordError when they are not what was written."""
        location = self.find([key])[0]
        return self.read(location) if location["shard"] else None

    def discard(self, key: bytes) -> None:
        """Make a key missing, so that it is made again."""
        self._index.discard(key)

    def mark(self) -> str:
        """A word that stays the same as long as every record stays where it is; adding records does not change it."""
        return self._index.mark()

    def changed_fact(self, subject: str, facts: Mapping[str, str]) -> str:
        """Why the record of a subject is missing: the first fact that differs from when it was last written.

        "new" where nothing is known of the subject, "lost" where nothing differs.
        """
        earlier = self._index.origin(subject)
        if earlier is None:
            return "new"
        return next((name for name, value in facts.items() if earlier.get(name) != value), "lost")

    def give_up(self) -> None:
        """Say that nobody needs the records any more, and that the folder may go: writers drop what they have not sealed."""
        self.given_up = True

    def close(self) -> None:
        self._index.close()
        with self._lock:
            self._maps.clear()
            self._use.close()
            if self.remote is not None:
                self.remote.close()

    # -- cleaning up ----------------------------------------------------------------------------------------------------

    def be_alone(self) -> None:
        """Keep everybody else out until `close`. DataError where another process has the cache open."""
        try:
            fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.folder}: the cache is in use by a run; wait for it or stop it, then clean up.") from None

    def retain(self, name: str, keys: Collection[bytes]) -> None:
        """Forget the records of a shard but those of some keys, and free the room of the rest. Only after `be_alone`.

        What stays is durable in a new shard before the old one goes. Of it, records that no longer read as they were written go too.
        """
        shard = self._index.named(name)
        assert shard is not None, name
        kept = [record for record in self._packed(shard) if record.key in keys and zlib.crc32(record.payload) == record.crc]
        if kept:
            path = self.folder / f"{time.time_ns():020d}-0-{os.getpid()}-0{SUFFIX}"
            with sealed_shard(path, kept) as placed:
                self._index.replace(shard, path.name, path.stat().st_size, placed)
        else:
            self._index.forget(shard)
        self._maps.pop(shard.number, None)
        (self.folder / name).unlink()

    def forget_origins(self, subjects: Collection[str]) -> None:
        """Forget what the records of some subjects were made of."""
        self._index.forget_origins(subjects)

    def _packed(self, shard: Shard) -> Iterator[Packed]:
        mapped = self._mapped(shard.number)
        for record in self._index.records(shard):
            yield Packed(record.key, record.layout, bytes(mapped[record.offset : record.offset + record.size]), record.crc)

    def _hold(self) -> IO[bytes]:
        """A lock that many may hold at once, for as long as the cache is open. DataError while somebody cleans it up."""
        try:
            stream = (self.folder / IN_USE).open("ab")
        except OSError as error:
            raise StorageError(f"{self.folder}: the cache folder cannot be written to: {error.strerror}.") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise DataError(f"{self.folder}: the cache is being cleaned up; start again when that is done.") from None
        return stream

    # -- writing: see Writer --------------------------------------------------------------------------------------------

    def commit(self, path: Path, placed: Sequence[Placed], origins: Mapping[str, Mapping[str, str]]) -> None:
        """Make what a sealed shard of the folder holds visible to all, after it is where it is to stay."""
        if self.remote is not None:
            self.remote.upload(path)
        self._index.enter(path.name, path.stat().st_size, placed, origins)
        self.make_room(0)

    def make_room(self, size: int) -> None:
        """Drop copies of stored shards until `size` more bytes are within the limit of the folder."""
        if self.remote is None or self.remote.limit is None:
            return
        stored = {shard.name: shard.number for shard in self._index.shards()}
        for name in self.remote.make_room(size, stored.__contains__):
            self._maps.pop(stored[name], None)

    # -- what is found when it is opened --------------------------------------------------------------------------------

    def _drop_lost_shards(self, known: Sequence[Shard], stored: Mapping[str, int]) -> None:
        for shard in known:
            path = self.folder / shard.name
            is_here = path.is_file() and path.stat().st_size == shard.size
            if stored.get(shard.name) == shard.size or (is_here and self.remote is None):
                if not is_here:
                    path.unlink(missing_ok=True)  # a copy that was cut off
                continue
            if is_here:
                self.notes.append(f"{path} was lost from the store.")  # and goes there again as a stray
            else:
                self.notes.append(f"{path} is gone or cut off; what it held will be made again.")
            self._index.forget(shard)

    def _take_in_strays(self, stored: Mapping[str, int]) -> None:
        """Files without a row, from killed processes or a lost index: whole shards enter the index, the rest is removed.

        Oldest first, as they were written. Files with other names are left alone.
        """
        for path in sorted(self.folder.iterdir()):
            if not SHARD_NAME.fullmatch(path.name) or self._index.named(path.name):
                continue
            with abandoned(path) as is_abandoned:
                if not is_abandoned or self._index.named(path.name):  # it may have been committed before the lock was free
                    continue
                if path.name.endswith(UNSEALED):
                    path.unlink()
                    continue
                try:
                    placed = read_header(path)
                    if stored.get(path.name) == path.stat().st_size:
                        self._index.enter(path.name, stored[path.name], placed, {})
                    else:
                        self.commit(path, placed, {})
                    self.notes.append(f"{path} was not in the index and has been taken in.")
                except DamagedShardError as error:
                    path.unlink()
                    self.notes.append(f"{path} was not in the index, and has been removed because {error}.")

    def _take_in_stored(self, remote: RemoteShards, stored: Mapping[str, int]) -> None:
        """Shards in the store that the index here does not know, from other machines or before it was lost. None is ever removed."""
        unknown = [(name, size) for name, size in stored.items() if SHARD_NAME.fullmatch(name) and not self._index.named(name)]
        taken = 0
        for name, size, found in remote.headers(unknown):
            if isinstance(found, DamagedShardError):
                self.notes.append(f"{remote.store.name}: {name} is left alone because {found}.")
            else:
                self._index.enter(name, size, found, {})
                taken += 1
        if taken:
            self.notes.append(f"{taken:,} {'shard' if taken == 1 else 'shards'} in {remote.store.name} taken in.")

    # -- reading --------------------------------------------------------------------------------------------------------

    def _mapped(self, number: int) -> memoryview:
        """The bytes of a shard. Once it is mapped the index is not asked again: that would cost as much as reading a small record."""
        mapped = self._maps.get(number)
        if mapped is None:
            shard = self._shard(number)
            path = self.folder / shard.name
            try:
                mapped = map_file(path, shard.size)
            except DamagedShardError as error:
                raise DamagedRecordError(f"{path}: {error}") from error
            with self._lock:
                if len(self._maps) >= _MAPPED_SHARDS:
                    del self._maps[next(iter(self._maps))]
                self._maps[number] = mapped
        return mapped

    def _payload_of_copy(self, remote: RemoteShards, number: int, offset: int, size: int, crc: int) -> bytearray | None:
        """The bytes of a record from the copy of its shard in the folder; None without a sound one, which is fetched for later."""
        was_mapped = number in self._maps
        try:
            payload = bytearray(self._mapped(number)[offset : offset + size])
        except DamagedRecordError:
            shard = self._shard(number)
            remote.want(shard.name, shard.size)
            return None
        if not was_mapped:
            remote.touch(self._shard(number).name)
        if zlib.crc32(payload) == crc:
            return payload
        self._maps.pop(number, None)
        remote.drop(self._shard(number).name)
        return None

    def _payload_stored(self, remote: RemoteShards, number: int, offset: int, size: int, crc: int) -> bytearray:
        """The bytes of a record from the store; read twice where they are damaged, which may have happened on the way."""
        name, payload = self._shard(number).name, None
        for _ in range(2):
            payload = remote.read(name, offset, size)
            if payload is None:
                raise DamagedRecordError(f"{remote.store.name}: {name} is gone")
            if zlib.crc32(payload) == crc:
                break
        return bytearray(payload or b"")

    def _shard(self, number: int) -> Shard:
        shard = self._index.shard(number)
        if shard is None:
            raise DamagedRecordError(f"{self.folder}: a shard of the cache was removed while it was in use")
        return shard


class Writer:
    """Adds records to a cache; leaving the `with` block seals what is open, also when the block is left by an error.

    A shard is sealed when it is full, or when the next record comes `seal_after` seconds after its first.
    """

    def __init__(self, cache: Cache, rank: int = 0, seal_after: float = SEAL_AFTER_SECONDS) -> None:
        self.cache = cache
        self.rank = rank
        self.seal_after = seal_after
        self.sealed = 0  # shards so far
        self._begin()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, StorageError):  # a store that has just failed would fail again
            self.seal()

    def add(self, key: bytes, tensors: Mapping[str, Tensor], subject: str | None = None, facts: Mapping[str, str] | None = None) -> None:
        """Keep tensors (on the CPU; they are copied) under a key. `subject` and `facts` are for `Cache.changed_fact`."""
        if subject is not None:
            self._origins[subject] = facts or {}
        if key in self._records:
            return
        record = pack(key, tensors)
        if self._records and (self._size + len(record.payload) > SHARD_BYTES or time.monotonic() - self._began > self.seal_after):
            self.seal()
        self._records[key] = record
        self._size += len(record.payload)

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """A record that is not sealed yet, as copies; None when there is none, or it lies in the cache already. From any thread."""
        record = self._records.get(key)
        return None if record is None else unpack(record.layout, bytearray(record.payload))

    def seal(self) -> None:
        """Make durable and visible to all what has been added. StorageError when that cannot be done; earlier shards stay."""
        if not self._records:
            return
        try:
            if not self.cache.given_up:
                self._seal()
        except StorageError:
            if not self.cache.given_up:  # else its folder may have gone in the meantime
                raise
        self._begin()

    def _seal(self) -> None:
        self.cache.make_room(self._size)
        path = self.cache.folder / f"{time.time_ns():020d}-{self.rank}-{os.getpid()}-{self.sealed}{SUFFIX}"
        with sealed_shard(path, list(self._records.values())) as placed:
            self.cache.commit(path, placed, self._origins)
        self.sealed += 1

    def _begin(self) -> None:
        self._records: dict[bytes, Packed] = {}
        self._origins: dict[str, Mapping[str, str]] = {}
        self._size = 0
        self._began = time.monotonic()
