"""The index of a cache, in SQLite: which shards there are, and which record lies where. It opens no shard.

What has no row here does not exist. Several processes of one machine may use it at once: SQLite's write-ahead log is not for network
file systems used by several machines.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helpers.data.cache.shards import Placed
from helpers.errors import StorageError

INDEX = "index.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, size INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS layouts (number INTEGER PRIMARY KEY, layout TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS records (key BLOB PRIMARY KEY, shard INTEGER NOT NULL, layout INTEGER NOT NULL,
    offset INTEGER NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS origins (subject TEXT PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS marks (mark TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS stores (name TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO marks SELECT hex(randomblob(8)) WHERE NOT EXISTS (SELECT 1 FROM marks);
"""

_NEW_MARK = "UPDATE marks SET mark = hex(randomblob(8))"

# Where a record lies; `shard` is 0 where there is none. Packed, for a plan of millions of rows.
LOCATION = np.dtype([("shard", "i4"), ("layout", "i4"), ("offset", "i8"), ("size", "i8"), ("crc", "u4")])
Locations = NDArray[np.void]


class Shard(NamedTuple):
    """A file of many records."""

    number: int
    name: str
    size: int  # bytes


class CacheIndex:
    """The index in a folder, made where there is none. Safe to use from several threads; StorageError where it cannot be used.

    `note` tells, in words for the user, that it was damaged and is empty now; it is "" otherwise. What it said stands in the shards too.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / INDEX
        self.note = ""
        self._lock = threading.RLock()
        self._layouts: dict[int, str] = {}
        self._database = self._open()

    def close(self) -> None:
        with self._lock:
            self._database.close()

    # -- records --------------------------------------------------------------------------------------------------------

    def find(self, keys: Iterable[bytes]) -> Locations:
        """Where the records of the keys lie, in their order; field "shard" is 0 where a key has none."""
        with self._using() as database:
            query = "SELECT shard, layout, offset, size, crc FROM records WHERE key = ?"
            rows = [database.execute(query, (key,)).fetchone() or (0, 0, 0, 0, 0) for key in keys]
        return np.array(rows, dtype=LOCATION)

    def layout(self, number: int) -> str:
        """The layout that records name by a number: what `shards.unpack` needs."""
        layout = self._layouts.get(number)
        if layout is None:
            with self._using() as database:
                (layout,) = database.execute("SELECT layout FROM layouts WHERE number = ?", (number,)).fetchone()
            self._layouts[number] = layout
        return layout

    def records(self, shard: Shard) -> list[Placed]:
        """What a shard holds, in the order of its bytes."""
        with self._using() as database:
            rows = database.execute(
                "SELECT key, layouts.layout, offset, size, crc FROM records JOIN layouts ON layouts.number = records.layout"
                " WHERE shard = ? ORDER BY offset",
                (shard.number,),
            )
            return [Placed(*row) for row in rows]

    def discard(self, key: bytes) -> None:
        """Make a key missing."""
        with self._using() as database:
            database.execute(_NEW_MARK)  # first: whoever is killed between the two looks everything up once more
            database.execute("DELETE FROM records WHERE key = ?", (key,))

    def mark(self) -> str:
        """A word that stays the same as long as every record stays where it is; adding records does not change it."""
        with self._using() as database:
            return database.execute("SELECT mark FROM marks").fetchone()[0]

    # -- shards ---------------------------------------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        with self._using() as database:
            return [Shard(*row) for row in database.execute("SELECT number, name, size FROM shards")]

    def shard(self, number: int) -> Shard | None:
        return self._shard("number", number)

    def named(self, name: str) -> Shard | None:
        return self._shard("name", name)

    def enter(self, name: str, size: int, placed: Sequence[Placed], origins: Mapping[str, Mapping[str, str]]) -> None:
        """Take a shard in, with the origins of its records, all or nothing; nothing of it where it is known already."""
        with self._transaction() as database:
            if self.named(name) is None:
                _insert(database, name, size, placed)
            rows = [(subject, json.dumps(facts)) for subject, facts in origins.items()]
            database.executemany("INSERT OR REPLACE INTO origins VALUES (?, ?)", rows)

    def forget(self, shard: Shard) -> None:
        """Take a shard out."""
        with self._transaction() as database:
            _delete(database, shard)

    def replace(self, shard: Shard, name: str, size: int, placed: Sequence[Placed]) -> None:
        """Take a shard out and another one in, all or nothing."""
        with self._transaction() as database:
            _delete(database, shard)
            _insert(database, name, size, placed)

    def note_store(self, name: str) -> None:
        """Keep the name of the place where the shards are, "" where that is the folder: for those who look at the folder alone."""
        with self._using() as database:
            if database.execute("SELECT name FROM stores").fetchall() != ([(name,)] if name else []):
                database.execute("DELETE FROM stores")
                database.executemany("INSERT INTO stores VALUES (?)", [(name,)] if name else [])

    # -- origins --------------------------------------------------------------------------------------------------------

    def origin(self, subject: str) -> dict[str, str] | None:
        """What the latest record of a subject was made of; None where nothing is known of the subject."""
        with self._using() as database:
            row = database.execute("SELECT facts FROM origins WHERE subject = ?", (subject,)).fetchone()
        return json.loads(row[0]) if row else None

    def forget_origins(self, subjects: Collection[str]) -> None:
        with self._transaction() as database:
            database.executemany("DELETE FROM origins WHERE subject = ?", ((subject,) for subject in subjects))

    # -- SQLite ---------------------------------------------------------------------------------------------------------

    def _shard(self, column: str, value: int | str) -> Shard | None:
        with self._using() as database:
            row = database.execute(f"SELECT number, name, size FROM shards WHERE {column} = ?", (value,)).fetchone()
        return Shard(*row) if row else None

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._database
            except sqlite3.Error as error:
                raise StorageError(f"{self.path}: the cache's index cannot be used: {error}.") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._using() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:  # SQLite ends some failed transactions itself
                    database.execute("ROLLBACK")
                raise

    def _open(self) -> sqlite3.Connection:
        try:
            return _connect(self.path)
        except sqlite3.OperationalError as error:
            raise StorageError(f"{self.path}: the cache's index cannot be opened: {error}.") from error
        except sqlite3.DatabaseError as error:  # not a database any more
            self.note = f"{self.path} was damaged ({error}) and has been made again from the shards."
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(INDEX + suffix).unlink(missing_ok=True)
            return _connect(self.path)


def _insert(database: sqlite3.Connection, name: str, size: int, placed: Sequence[Placed]) -> None:
    number = database.execute("INSERT INTO shards (name, size) VALUES (?, ?)", (name, size)).lastrowid
    layouts = {}
    for layout in {record.layout for record in placed}:
        database.execute("INSERT OR IGNORE INTO layouts (layout) VALUES (?)", (layout,))
        layouts[layout] = database.execute("SELECT number FROM layouts WHERE layout = ?", (layout,)).fetchone()[0]
    rows = [(record.key, number, layouts[record.layout], record.offset, record.size, record.crc) for record in placed]
    database.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?)", rows)


def _delete(database: sqlite3.Connection, shard: Shard) -> None:
    database.execute(_NEW_MARK)
    database.execute("DELETE FROM records WHERE shard = ?", (shard.number,))
    database.execute("DELETE FROM shards WHERE number = ?", (shard.number,))


def _connect(path: Path) -> sqlite3.Connection:
    # Autocommit: transactions are begun where they are needed. A minute's patience for other processes' commits.
    database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    _use_write_ahead_log(database)
    database.execute("PRAGMA synchronous = FULL")
    database.executescript(_SCHEMA)
    return database


def _use_write_ahead_log(database: sqlite3.Connection) -> None:
    """The one statement that SQLite does not wait for: where several processes open a new index at once, all but one are refused."""
    give_up = time.monotonic() + 60
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.05)
