"""Tensors under a key, in sealed shards with a SQLite index. What has no row in the index does not exist.

Several processes may read and write one cache: each writer fills shards of its own, and a shard enters the index in one commit
after it is durable. A killed process loses its open shard and nothing else. Processes must share the machine: SQLite's
write-ahead log is not for network file systems used by several machines.

The first record of a key stays. Two identical images are encoded beside different neighbours and differ in the last bits, and which
of them a run trains on must not depend on when it was killed. To replace a record, discard it first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from helpers.data.remote_shards import RemoteShards
from helpers.data.shards import (
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

INDEX = "index.sqlite"
IN_USE = ".in-use"  # locked by everybody who has the cache open
SHARD_BYTES = 64 * 2**20
SEAL_AFTER_SECONDS = 30.0  # unless the writer is told otherwise
SHARD_NAME = re.compile(rf"\d{{20}}-\d+-\d+-\d+{re.escape(SUFFIX)}({re.escape(UNSEALED)})?")
_MAPPED_SHARDS = 4096  # kept mapped at a time; the kernel allows a process 65,530 mappings

_SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, size INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS layouts (number INTEGER PRIMARY KEY, layout TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS records (key BLOB PRIMARY KEY, shard INTEGER NOT NULL, layout INTEGER NOT NULL,
    offset INTEGER NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS origins (subject TEXT PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS marks (mark TEXT NOT NULL);
INSERT INTO marks SELECT hex(randomblob(8)) WHERE NOT EXISTS (SELECT 1 FROM marks);
"""

_NEW_MARK = "UPDATE marks SET mark = hex(randomblob(8))"

# Where a record lies; `shard` is 0 where there is none. Packed, for a plan of millions of rows.
LOCATION = np.dtype([("shard", "i4"), ("layout", "i4"), ("offset", "i8"), ("size", "i8"), ("crc", "u4")])
Locations = NDArray[np.void]


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
        self._lock = threading.RLock()
        self._maps: dict[int, memoryview] = {}
        self._layouts: dict[int, str] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: the cache folder cannot be made: {error.strerror}.") from error
        self._use = self._hold()
        self._index = self._open_index()
        known = self._shards()
        stored = remote.listed() if remote is not None else {}  # after the index: what that knew has been uploaded
        self._drop_rows_of_lost_shards(known, stored)
        self._take_in_strays(stored)
        if remote is not None:
            self._take_in_stored(remote, stored)

    def find(self, keys: Iterable[bytes]) -> Locations:
        """Where the records of the keys lie, in their order; field "shard" is 0 where a key has none."""
        with self._using_index() as index:
            query = "SELECT shard, layout, offset, size, crc FROM records WHERE key = ?"
            rows = [index.execute(query, (key,)).fetchone() or (0, 0, 0, 0, 0) for key in keys]
        return np.array(rows, dtype=LOCATION)

    def read(self, location: np.void) -> dict[str, Tensor]:
        """The tensors of a record, as copies. DamagedRecordError when they are not what was written."""
        shard, layout, offset, size, crc = location.item()
        if self.remote is None:
            payload = bytearray(self._mapped(shard)[offset : offset + size])
        else:
            copied = self._payload_of_copy(self.remote, shard, offset, size, crc)
            payload = self._payload_stored(self.remote, shard, offset, size, crc) if copied is None else copied
        if zlib.crc32(payload) != crc:
            raise DamagedRecordError(f"{self._shard_path(shard)[0]}: a record has changed since it was written")
        return unpack(self._layout(layout), payload)

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors under a key, or None. DamagedRecordError when they are not what was written."""
        location = self.find([key])[0]
        return self.read(location) if location["shard"] else None

    def discard(self, key: bytes) -> None:
        """Make a key missing, so that it is made again."""
        with self._using_index() as index:
            index.execute(_NEW_MARK)  # first: whoever is killed between the two looks everything up once more
            index.execute("DELETE FROM records WHERE key = ?", (key,))

    def mark(self) -> str:
        """A word that stays the same as long as every record stays where it is; adding records does not change it."""
        with self._using_index() as index:
            return index.execute("SELECT mark FROM marks").fetchone()[0]

    def changed_fact(self, subject: str, facts: Mapping[str, str]) -> str:
        """Why the record of a subject is missing: the first fact that differs from when it was last written.

        "new" where nothing is known of the subject, "lost" where nothing differs.
        """
        with self._using_index() as index:
            row = index.execute("SELECT facts FROM origins WHERE subject = ?", (subject,)).fetchone()
        if row is None:
            return "new"
        earlier = json.loads(row[0])
        return next((name for name, value in facts.items() if earlier.get(name) != value), "lost")

    def give_up(self) -> None:
        """Say that nobody needs the records any more, and that the folder may go: writers drop what they have not sealed."""
        self.given_up = True

    def close(self) -> None:
        with self._lock:
            self._index.close()
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
        with self._using_index() as index:
            (shard,) = index.execute("SELECT number FROM shards WHERE name = ?", (name,)).fetchone()
        kept = [record for record in self._packed(shard) if record.key in keys and zlib.crc32(record.payload) == record.crc]
        if kept:
            path = self.folder / f"{time.time_ns():020d}-0-{os.getpid()}-0{SUFFIX}"
            with sealed_shard(path, kept) as placed:
                self._replace(shard, path, placed)
        else:
            self._replace(shard, None, ())
        self._maps.pop(shard, None)
        (self.folder / name).unlink()

    def forget_origins(self, subjects: Collection[str]) -> None:
        """Forget what the records of some subjects were made of."""
        with self._using_index() as index:
            index.execute("BEGIN IMMEDIATE")
            index.executemany("DELETE FROM origins WHERE subject = ?", ((subject,) for subject in subjects))
            index.execute("COMMIT")

    def _packed(self, shard: int) -> Iterator[Packed]:
        mapped = self._mapped(shard)
        with self._using_index() as index:
            rows = index.execute(
                "SELECT key, layouts.layout, offset, size, crc FROM records JOIN layouts ON layouts.number = records.layout"
                " WHERE shard = ? ORDER BY offset",
                (shard,),
            ).fetchall()
        for key, layout, offset, size, crc in rows:
            yield Packed(key, layout, bytes(mapped[offset : offset + size]), crc)

    def _replace(self, shard: int, path: Path | None, placed: Sequence[Placed]) -> None:
        """Take a shard out of the index and another one in, all or nothing."""
        with self._using_index() as index:
            index.execute("BEGIN IMMEDIATE")
            try:
                index.execute(_NEW_MARK)
                index.execute("DELETE FROM records WHERE shard = ?", (shard,))
                index.execute("DELETE FROM shards WHERE number = ?", (shard,))
                if path is not None:
                    self._insert_shard(index, path.name, path.stat().st_size, placed)
                index.execute("COMMIT")
            except BaseException:
                if index.in_transaction:
                    index.execute("ROLLBACK")
                raise

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
        self._enter(path.name, path.stat().st_size, placed, origins)
        self.make_room(0)

    def make_room(self, size: int) -> None:
        """Drop copies of stored shards until `size` more bytes are within the limit of the folder."""
        if self.remote is None or self.remote.limit is None:
            return
        stored = {name: number for number, name, _ in self._shards()}
        for name in self.remote.make_room(size, stored.__contains__):
            self._maps.pop(stored[name], None)

    def _enter(self, name: str, size: int, placed: Sequence[Placed], origins: Mapping[str, Mapping[str, str]]) -> None:
        """Enter a durable shard into the index, with the origins of its records, all or nothing; nothing where it is known already."""
        with self._using_index() as index:
            index.execute("BEGIN IMMEDIATE")
            try:
                if not self._knows(name):
                    self._insert_shard(index, name, size, placed)
                rows = [(subject, json.dumps(facts)) for subject, facts in origins.items()]
                index.executemany("INSERT OR REPLACE INTO origins VALUES (?, ?)", rows)
                index.execute("COMMIT")
            except BaseException:
                if index.in_transaction:  # SQLite ends some failed transactions itself
                    index.execute("ROLLBACK")
                raise

    def _insert_shard(self, index: sqlite3.Connection, name: str, size: int, placed: Sequence[Placed]) -> None:
        number = index.execute("INSERT INTO shards (name, size) VALUES (?, ?)", (name, size)).lastrowid
        layouts = {}
        for layout in {record.layout for record in placed}:
            index.execute("INSERT OR IGNORE INTO layouts (layout) VALUES (?)", (layout,))
            layouts[layout] = index.execute("SELECT number FROM layouts WHERE layout = ?", (layout,)).fetchone()[0]
        rows = [(record.key, number, layouts[record.layout], record.offset, record.size, record.crc) for record in placed]
        index.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?)", rows)

    # -- the index ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _using_index(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._index
            except sqlite3.Error as error:
                raise StorageError(f"{self.folder / INDEX}: the cache's index cannot be used: {error}.") from error

    def _open_index(self) -> sqlite3.Connection:
        path = self.folder / INDEX
        try:
            return _connect(path)
        except sqlite3.OperationalError as error:
            raise StorageError(f"{path}: the cache's index cannot be opened: {error}.") from error
        except sqlite3.DatabaseError as error:  # not a database any more: what it said stands in the shards too
            self.notes.append(f"{path} was damaged ({error}) and has been made again from the shards.")
            for suffix in ("", "-wal", "-shm"):
                path.with_name(INDEX + suffix).unlink(missing_ok=True)
            return _connect(path)

    def _shards(self) -> list[tuple[int, str, int]]:
        """Number, name and size of every shard that the index knows."""
        with self._using_index() as index:
            return index.execute("SELECT number, name, size FROM shards").fetchall()

    def _drop_rows_of_lost_shards(self, known: Sequence[tuple[int, str, int]], stored: Mapping[str, int]) -> None:
        for number, name, size in known:
            path = self.folder / name
            is_here = path.is_file() and path.stat().st_size == size
            if stored.get(name) == size or (is_here and self.remote is None):
                if not is_here:
                    path.unlink(missing_ok=True)  # a copy that was cut off
                continue
            if is_here:
                self.notes.append(f"{path} was lost from the store.")  # and goes there again as a stray
            else:
                self.notes.append(f"{path} is gone or cut off; what it held will be made again.")
            with self._using_index() as index:
                index.execute(_NEW_MARK)
                index.execute("DELETE FROM records WHERE shard = ?", (number,))
                index.execute("DELETE FROM shards WHERE number = ?", (number,))

    def _take_in_strays(self, stored: Mapping[str, int]) -> None:
        """Files without a row, from killed processes or a lost index: whole shards enter the index, the rest is removed.

        Oldest first, as they were written. Files with other names are left alone.
        """
        for path in sorted(self.folder.iterdir()):
            if not SHARD_NAME.fullmatch(path.name) or self._knows(path.name):
                continue
            with abandoned(path) as is_abandoned:
                if not is_abandoned or self._knows(path.name):  # it may have been committed before the lock was free
                    continue
                if path.name.endswith(UNSEALED):
                    path.unlink()
                    continue
                try:
                    placed = read_header(path)
                    if stored.get(path.name) == path.stat().st_size:
                        self._enter(path.name, stored[path.name], placed, {})
                    else:
                        self.commit(path, placed, {})
                    self.notes.append(f"{path} was not in the index and has been taken in.")
                except DamagedShardError as error:
                    path.unlink()
                    self.notes.append(f"{path} was not in the index, and has been removed because {error}.")

    def _take_in_stored(self, remote: RemoteShards, stored: Mapping[str, int]) -> None:
        """Shards in the store that the index here does not know, from other machines or before it was lost. None is ever removed."""
        unknown = [(name, size) for name, size in stored.items() if SHARD_NAME.fullmatch(name) and not self._knows(name)]
        taken = 0
        for name, size, found in remote.headers(unknown):
            if isinstance(found, DamagedShardError):
                self.notes.append(f"{remote.store.name}: {name} is left alone because {found}.")
            else:
                self._enter(name, size, found, {})
                taken += 1
        if taken:
            self.notes.append(f"{taken:,} {'shard' if taken == 1 else 'shards'} in {remote.store.name} taken in.")

    def _knows(self, name: str) -> bool:
        with self._using_index() as index:
            return index.execute("SELECT 1 FROM shards WHERE name = ?", (name,)).fetchone() is not None

    # -- reading --------------------------------------------------------------------------------------------------------

    def _mapped(self, shard: int) -> memoryview:
        mapped = self._maps.get(shard)
        if mapped is None:
            path, size = self._shard_path(shard)
            try:
                mapped = map_file(path, size)
            except DamagedShardError as error:
                raise DamagedRecordError(f"{path}: {error}") from error
            with self._lock:
                if len(self._maps) >= _MAPPED_SHARDS:
                    del self._maps[next(iter(self._maps))]
                self._maps[shard] = mapped
        return mapped

    def _payload_of_copy(self, remote: RemoteShards, shard: int, offset: int, size: int, crc: int) -> bytearray | None:
        """The bytes of a record from the copy of its shard in the folder; None without a sound one, which is fetched for later."""
        path, shard_size = self._shard_path(shard)
        was_mapped = shard in self._maps
        try:
            payload = bytearray(self._mapped(shard)[offset : offset + size])
        except DamagedRecordError:
            remote.want(path.name, shard_size)
            return None
        if not was_mapped:
            remote.touch(path.name)
        if zlib.crc32(payload) == crc:
            return payload
        self._maps.pop(shard, None)
        remote.drop(path.name)
        return None

    def _payload_stored(self, remote: RemoteShards, shard: int, offset: int, size: int, crc: int) -> bytearray:
        """The bytes of a record from the store; read twice where they are damaged, which may have happened on the way."""
        name = self._shard_path(shard)[0].name
        payload = None
        for _ in range(2):
            payload = remote.read(name, offset, size)
            if payload is None:
                raise DamagedRecordError(f"{remote.store.name}: {name} is gone")
            if zlib.crc32(payload) == crc:
                break
        return bytearray(payload or b"")

    def _shard_path(self, shard: int) -> tuple[Path, int]:
        with self._using_index() as index:
            row = index.execute("SELECT name, size FROM shards WHERE number = ?", (shard,)).fetchone()
        if row is None:
            raise DamagedRecordError(f"{self.folder}: a shard of the cache was removed while it was in use")
        return self.folder / row[0], row[1]

    def _layout(self, number: int) -> str:
        layout = self._layouts.get(number)
        if layout is None:
            with self._using_index() as index:
                layout = self._layouts[number] = index.execute("SELECT layout FROM layouts WHERE number = ?", (number,)).fetchone()[0]
        return layout


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


def _connect(path: Path) -> sqlite3.Connection:
    # Autocommit: transactions are begun where they are needed. A minute's patience for other processes' commits.
    index = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    _use_write_ahead_log(index)
    index.execute("PRAGMA synchronous = FULL")
    index.executescript(_SCHEMA)
    return index


def _use_write_ahead_log(index: sqlite3.Connection) -> None:
    """The one statement that SQLite does not wait for: where several processes open a new index at once, all but one are refused."""
    give_up = time.monotonic() + 60
    while True:
        try:
            index.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.05)
