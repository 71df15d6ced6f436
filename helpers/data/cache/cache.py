"""A cache of tensors by key: records in sealed shards, found through an index.

    with Writer(cache) as writer:
        writer.add(record_key("image", sha256), {"mean": latents})
    cache.get(record_key("image", sha256))  # {"mean": ...}

Several processes of one machine may read and write one cache. Each writer fills its own shards. A shard is first made durable, then added
to the index in one transaction. So a killed process loses only its open shard. A record that is not in the index does not exist.

The first record of a key stays; to replace it, discard it first. Two identical images are encoded in different batches, and their latents
differ in the last bits. Which of the two a run trains on must not depend on when it was killed.
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
    PackedRecord,
    RecordEntry,
    map_file,
    pack,
    read_header,
    sealed_shard,
    unpack,
    unused_file,
)
from helpers.errors import DataError, StorageError
from helpers.storage.full_disk import until_written

IN_USE = ".in-use"  # every process that has the cache open holds a shared lock on it
SHARD_BYTES = 64 * 2**20
SEAL_AFTER_SECONDS = 30.0  # default of a writer
SHARD_NAME = re.compile(rf"\d{{20}}-\d+-\d+-\d+{re.escape(SUFFIX)}({re.escape(UNSEALED)})?")
_MAPPED_SHARDS = 4096  # memory-mapped at the same time; Linux allows a process 65,530 mappings


class DamagedRecordError(Exception):
    """A record differs from what was written. Discard and encode it again. The message names its file."""


def record_key(*parts: str) -> bytes:
    """A key of 16 bytes. It depends on every part and on their boundaries: ("ab", "c") and ("a", "bc") give different keys."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


class Cache:
    """The records in a folder. Safe to use from several threads.

    With `remote`, the shards are in a store, and the folder holds the index and copies of some shards. `notes` lists, in words for the
    user, what was wrong and repaired when the cache was opened. Opening raises StorageError, and DataError if the store denies access.
    """

    def __init__(self, folder: Path, remote: RemoteShards | None = None) -> None:
        self.folder = folder
        self.remote = remote
        self.notes: list[str] = []
        self.given_up = False
        self._lock = threading.Lock()
        self._maps: dict[int, tuple[memoryview, Path]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: the cache folder cannot be made: {error.strerror}.") from error
        self._use = self._lock_shared()
        self._index = CacheIndex(folder)
        if self._index.note:
            self.notes.append(self._index.note)
        self._index.set_store(remote.store.name if remote is not None else "")
        known = self._index.shards()
        stored = remote.listed() if remote is not None else {}  # after reading the index: what that names was uploaded
        self._remove_lost_shards(known, stored)
        self._add_unindexed_files(stored)
        if remote is not None:
            self._add_stored_shards(remote, stored)

    def find(self, keys: Iterable[bytes]) -> Locations:
        """The locations of the records of some keys, in the order of the keys. Field "shard" is 0 where there is no record."""
        return self._index.find(keys)

    def read(self, location: np.void) -> dict[str, Tensor]:
        """The tensors of a record, as copies. DamagedRecordError if they differ from what was written."""
        shard, layout, offset, size, crc = location.item()
        if self.remote is None:
            payload = bytearray(self._mapped(shard)[offset : offset + size])
        else:
            copied = self._payload_of_copy(self.remote, shard, offset, size, crc)
            payload = self._payload_stored(self.remote, shard, offset, size, crc) if copied is None else copied
        known_layout = self._index.layout(layout)
        if zlib.crc32(payload) != crc or known_layout is None:
            raise DamagedRecordError(f"{self.folder / self._shard(shard).name}: a record has changed since it was written")
        return unpack(known_layout, payload)

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors of a key, as copies, or None. DamagedRecordError if they differ from what was written."""
        location = self.find([key])[0]
        return self.read(location) if location["shard"] else None

    def discard(self, key: bytes) -> None:
        """Remove a record from the index, so that it is encoded again."""
        self._index.discard(key)

    def revision(self) -> str:
        """A random token, replaced whenever a record is removed or moved. Adding records keeps it."""
        return self._index.revision()

    def changed_fact(self, subject: str, facts: Mapping[str, str]) -> str:
        """The reason why the record of a subject is missing: the name of the first fact that differs from the last record's.

        "new" if the subject never had a record, "lost" if no fact differs.
        """
        earlier = self._index.origin(subject)
        if earlier is None:
            return "new"
        return next((name for name, value in facts.items() if earlier.get(name) != value), "lost")

    def give_up(self) -> None:
        """Declare the cache unneeded: its folder may be deleted, and writers discard what they have not sealed."""
        self.given_up = True

    def close(self) -> None:
        self._index.close()
        with self._lock:
            self._maps.clear()
            self._use.close()
            if self.remote is not None:
                self.remote.close()

    # -- garbage collection ----------------------------------------------------------------------------------------------------

    def lock_exclusively(self) -> None:
        """Keep other processes out until `close`. DataError if one has the cache open."""
        try:
            fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.folder}: the cache is in use by a run; wait until the run ends or stop it, then clean up.") from None

    def keep_only(self, name: str, keys: Collection[bytes]) -> None:
        """Rewrite a shard with the records of these keys only. Call `lock_exclusively` first.

        The new shard is durable before the old one is deleted. Damaged records are removed too.
        """
        shard = self._index.shard_named(name)
        assert shard is not None, name
        kept = [record for record in self._records(shard) if record.key in keys and zlib.crc32(record.payload) == record.crc]
        if kept:
            path = self.folder / f"{time.time_ns():020d}-0-{os.getpid()}-0{SUFFIX}"
            with sealed_shard(path, kept) as records:
                self._index.replace_shard(shard, path.name, path.stat().st_size, records)
        else:
            self._index.remove_shard(shard)
        self._maps.pop(shard.number, None)
        (self.folder / name).unlink()

    def remove_origins(self, subjects: Collection[str]) -> None:
        """Remove what `changed_fact` compares with, for some subjects."""
        self._index.remove_origins(subjects)

    def _records(self, shard: Shard) -> Iterator[PackedRecord]:
        mapped = self._mapped(shard.number)
        for record in self._index.records(shard):
            yield PackedRecord(record.key, record.layout, bytes(mapped[record.offset : record.offset + record.size]), record.crc)

    def _lock_shared(self) -> IO[bytes]:
        """A lock that any number of processes hold while the cache is open. DataError while another process cleans it up."""
        try:
            stream = (self.folder / IN_USE).open("ab")
        except OSError as error:
            raise StorageError(f"{self.folder}: the cache folder is not writable: {error.strerror}.") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise DataError(f"{self.folder}: the cache is being cleaned up; start again when that has finished.") from None
        return stream

    # -- writing: see Writer --------------------------------------------------------------------------------------------

    def commit(self, path: Path, records: Sequence[RecordEntry], origins: Mapping[str, Mapping[str, str]]) -> None:
        """Make the records of a sealed shard visible to all processes; upload the shard before, if the cache has a store."""
        if self.remote is not None:
            self.remote.upload(path)
        self._index.add_shard(path.name, path.stat().st_size, records, origins)
        self.make_room(0)

    def make_room(self, size: int) -> None:
        """Delete copies of stored shards until `size` more bytes fit into the folder's limit."""
        if self.remote is None or self.remote.limit is None:
            return
        stored = {shard.name: shard.number for shard in self._index.shards()}
        for name in self.remote.make_room(size, stored.__contains__):
            self._maps.pop(stored[name], None)

    # -- opening: compare index, folder and store --------------------------------------------------------------------------------

    def _remove_lost_shards(self, known: Sequence[Shard], stored: Mapping[str, int]) -> None:
        for shard in known:
            path = self.folder / shard.name
            is_here = path.is_file() and path.stat().st_size == shard.size
            if stored.get(shard.name) == shard.size or (is_here and self.remote is None):
                if not is_here:
                    path.unlink(missing_ok=True)  # an incomplete copy
                continue
            if is_here:
                self.notes.append(f"{path} was missing from the store, and is uploaded again.")  # by `_add_unindexed_files`
            else:
                self.notes.append(f"{path} is missing or incomplete; its records will be encoded again.")
            self._index.remove_shard(shard)

    def _add_unindexed_files(self, stored: Mapping[str, int]) -> None:
        """Files left by killed processes or a lost index: add complete shards to the index, delete incomplete ones.

        In the order in which they were written. Files with other names are not touched.
        """
        for path in sorted(self.folder.iterdir()):
            if not SHARD_NAME.fullmatch(path.name) or self._index.shard_named(path.name):
                continue
            with unused_file(path) as is_unused:
                if not is_unused or self._index.shard_named(path.name):  # committed while this process waited for the lock
                    continue
                if path.name.endswith(UNSEALED):
                    path.unlink()
                    continue
                try:
                    records = read_header(path)
                    if stored.get(path.name) == path.stat().st_size:
                        self._index.add_shard(path.name, stored[path.name], records, {})
                    else:
                        self.commit(path, records, {})
                    self.notes.append(f"{path} was not in the index, and was added to it.")
                except DamagedShardError as error:
                    path.unlink()
                    self.notes.append(f"{path} was not in the index, and was deleted: {error}.")

    def _add_stored_shards(self, remote: RemoteShards, stored: Mapping[str, int]) -> None:
        """Add shards that other machines uploaded, or that a lost index knew. Nothing is deleted in the store."""
        unknown = [(name, size) for name, size in stored.items() if SHARD_NAME.fullmatch(name) and not self._index.shard_named(name)]
        added = 0
        for name, size, found in remote.headers(unknown):
            if isinstance(found, DamagedShardError):
                self.notes.append(f"{remote.store.name}: {name} is not used: {found}.")
            else:
                self._index.add_shard(name, size, found, {})
                added += 1
        if added:
            self.notes.append(f"{added:,} {'shard' if added == 1 else 'shards'} in {remote.store.name} added to the index.")

    # -- reading --------------------------------------------------------------------------------------------------------

    def _mapped(self, number: int) -> memoryview:
        """The bytes of a shard, memory-mapped. A mapped shard needs no query of the index, which takes as long as a small record."""
        known = self._maps.get(number)
        if known is not None:
            mapped, path = known
            if not _is_shorter(path, len(mapped)):
                return mapped
            self._maps.pop(number, None)
        shard = self._shard(number)
        path = self.folder / shard.name
        try:
            mapped = map_file(path, shard.size)
        except DamagedShardError as error:
            raise DamagedRecordError(f"{path}: {error}") from error
        with self._lock:
            if len(self._maps) >= _MAPPED_SHARDS:
                del self._maps[next(iter(self._maps))]
            self._maps[number] = mapped, path
        return mapped

    def _payload_of_copy(self, remote: RemoteShards, number: int, offset: int, size: int, crc: int) -> bytearray | None:
        """The bytes of a record from the local copy of its shard. None without an intact copy, which is then downloaded for later reads."""
        was_mapped = number in self._maps
        try:
            payload = bytearray(self._mapped(number)[offset : offset + size])
        except DamagedRecordError:
            shard = self._shard(number)
            remote.download_later(shard.name, shard.size)
            return None
        if not was_mapped:
            remote.mark_used(self._shard(number).name)
        if zlib.crc32(payload) == crc:
            return payload
        self._maps.pop(number, None)
        remote.delete_copy(self._shard(number).name)
        return None

    def _payload_stored(self, remote: RemoteShards, number: int, offset: int, size: int, crc: int) -> bytearray:
        """The bytes of a record from the store. Damaged bytes are read a second time: they may have been damaged in transfer."""
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
            raise DamagedRecordError(f"{self.folder}: a shard of the cache was deleted while it was in use")
        return shard


def _is_shorter(path: Path, size: int) -> bool:
    """Whether a mapped file has been cut off: reading beyond its end would kill the process. One that was deleted can still be read."""
    try:
        return os.stat(path).st_size < size
    except OSError:
        return False


class Writer:
    """Adds records to a cache. Leaving the `with` block seals the open shard, also after an error.

    A shard is also sealed when it is full, and when a record is added more than `seal_after` seconds after the shard's first one.
    """

    def __init__(self, cache: Cache, rank: int = 0, seal_after: float = SEAL_AFTER_SECONDS) -> None:
        self.cache = cache
        self.rank = rank
        self.seal_after = seal_after
        self.sealed = 0  # shards written so far
        self._begin()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, StorageError):  # the disk or store has just failed, and would fail again
            self.seal()

    def add(self, key: bytes, tensors: Mapping[str, Tensor], subject: str | None = None, facts: Mapping[str, str] | None = None) -> None:
        """Add tensors under a key. They must be on the CPU, and are copied. `subject` and `facts` are for `Cache.changed_fact`."""
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
        """A record of the open shard, as copies; None if there is none or it is sealed already. From any thread."""
        record = self._records.get(key)
        return None if record is None else unpack(record.layout, bytearray(record.payload))

    def seal(self) -> None:
        """Make the records added so far durable and visible to all processes. StorageError if that fails; earlier shards stay."""
        if not self._records:
            return
        try:
            if not self.cache.given_up:
                until_written(self.cache.folder, self._seal)
        except StorageError:
            if not self.cache.given_up:  # else its folder may have been deleted meanwhile
                raise
        self._begin()

    def _seal(self) -> None:
        self.cache.make_room(self._size)
        path = self.cache.folder / f"{time.time_ns():020d}-{self.rank}-{os.getpid()}-{self.sealed}{SUFFIX}"
        with sealed_shard(path, list(self._records.values())) as records:
            self.cache.commit(path, records, self._origins)
        self.sealed += 1

    def _begin(self) -> None:
        self._records: dict[bytes, PackedRecord] = {}
        self._origins: dict[str, Mapping[str, str]] = {}
        self._size = 0
        self._began = time.monotonic()
