"""The index of a cache, in SQLite: which shards there are, and where in them each record lies. It opens no shard.

A record without a row here does not exist for readers. The index can be rebuilt from the shards.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helpers.data.cache.shards import RecordEntry
from helpers.storage.database import DamagedDatabaseError, Database, remove_database

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

_NEW_REVISION = "UPDATE marks SET mark = hex(randomblob(8))"

# Where a record lies. `shard` is 0 if there is no record. Packed to 28 bytes, because a plan has millions of rows.
LOCATION = np.dtype([("shard", "i4"), ("layout", "i4"), ("offset", "i8"), ("size", "i8"), ("crc", "u4")])
Locations = NDArray[np.void]


class Shard(NamedTuple):
    """A file that holds many records."""

    number: int
    name: str
    size: int  # bytes


class CacheIndex:
    """The index in a folder, created if there is none. Safe to use from several threads and processes of one machine.

    A damaged index is replaced by an empty one; `note` then says so, in words for the user, and is "" otherwise. Every method raises
    StorageError when the disk fails.
    """

    def __init__(self, folder: Path) -> None:
        self.note = ""
        self._layouts: dict[int, str] = {}
        path = folder / INDEX
        try:
            self._database = _open(path)
        except DamagedDatabaseError as error:
            self.note = f"{path} was damaged ({error.__cause__}) and has been rebuilt from the shards."
            remove_database(path)
            self._database = _open(path)

    def close(self) -> None:
        self._database.close()

    # -- records --------------------------------------------------------------------------------------------------------

    def find(self, keys: Iterable[bytes]) -> Locations:
        """The locations of the records of some keys, in the order of the keys. Field "shard" is 0 where there is no record."""
        with self._database.connection() as connection:
            query = "SELECT shard, layout, offset, size, crc FROM records WHERE key = ?"
            rows = [connection.execute(query, (key,)).fetchone() or (0, 0, 0, 0, 0) for key in keys]
        return np.array(rows, dtype=LOCATION)

    def layout(self, number: int) -> str | None:
        """The layout with this number, as `shards.unpack` takes it. None if there is none: then the record's row is damaged."""
        layout = self._layouts.get(number)
        if layout is None and (row := self._database.row("SELECT layout FROM layouts WHERE number = ?", number)) is not None:
            layout = self._layouts[number] = row[0]
        return layout

    def records(self, shard: Shard) -> list[RecordEntry]:
        """The records of a shard, in the order of their bytes."""
        query = (
            "SELECT key, layouts.layout, offset, size, crc FROM records JOIN layouts ON layouts.number = records.layout"
            " WHERE shard = ? ORDER BY offset"
        )
        return [RecordEntry(*row) for row in self._database.rows(query, shard.number)]

    def discard(self, key: bytes) -> None:
        """Remove a record from the index."""
        with self._database.connection() as connection:
            connection.execute(_NEW_REVISION)  # first: a kill between the two statements costs one more lookup, not a wrong one
            connection.execute("DELETE FROM records WHERE key = ?", (key,))

    def revision(self) -> str:
        """A random token, replaced whenever a record is removed or moved. Adding records keeps it."""
        row = self._database.row("SELECT mark FROM marks")
        assert row is not None
        return str(row[0])

    # -- shards ---------------------------------------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        return [Shard(*row) for row in self._database.rows("SELECT number, name, size FROM shards")]

    def shard(self, number: int) -> Shard | None:
        row = self._database.row("SELECT number, name, size FROM shards WHERE number = ?", number)
        return Shard(*row) if row else None

    def shard_named(self, name: str) -> Shard | None:
        row = self._database.row("SELECT number, name, size FROM shards WHERE name = ?", name)
        return Shard(*row) if row else None

    def add_shard(self, name: str, size: int, records: Sequence[RecordEntry], origins: Mapping[str, Mapping[str, str]]) -> None:
        """Add a shard, its records and their origins, all or nothing. A shard that is already known stays as it is."""
        with self._database.transaction() as connection:
            if self.shard_named(name) is None:
                _insert(connection, name, size, records)
            rows = [(subject, json.dumps(facts)) for subject, facts in origins.items()]
            connection.executemany("INSERT OR REPLACE INTO origins VALUES (?, ?)", rows)

    def remove_shard(self, shard: Shard) -> None:
        """Remove a shard and its records from the index."""
        with self._database.transaction() as connection:
            _delete(connection, shard)

    def replace_shard(self, shard: Shard, name: str, size: int, records: Sequence[RecordEntry]) -> None:
        """Remove a shard and add another one, all or nothing."""
        with self._database.transaction() as connection:
            _delete(connection, shard)
            _insert(connection, name, size, records)

    def set_store(self, name: str) -> None:
        """Note where the shards are stored, for programs that see only the folder; "" if they are in the folder."""
        rows = [(name,)] if name else []
        if list(self._database.rows("SELECT name FROM stores")) == rows:
            return  # opening a cache needs no write lock
        with self._database.transaction() as connection:  # another opening of the same folder may do this at the same time
            connection.execute("DELETE FROM stores")
            connection.executemany("INSERT INTO stores VALUES (?)", rows)

    # -- origins: what the latest record of an image or caption was made from ---------------------------------------------

    def origin(self, subject: str) -> dict[str, str] | None:
        """The facts stored with the latest record of a subject; None if there never was one."""
        row = self._database.row("SELECT facts FROM origins WHERE subject = ?", subject)
        return json.loads(row[0]) if row else None

    def remove_origins(self, subjects: Collection[str]) -> None:
        with self._database.transaction() as connection:
            connection.executemany("DELETE FROM origins WHERE subject = ?", ((subject,) for subject in subjects))


def _open(path: Path) -> Database:
    database = Database(path, "FULL", "start again, and it is rebuilt from the shards")
    try:
        with database.connection() as connection:
            connection.executescript(_SCHEMA)
            verified_layouts(connection)
    except BaseException:
        database.close()
        raise
    return database


def verified_layouts(connection: sqlite3.Connection) -> dict[int, str]:
    """The layouts of an index by their numbers. sqlite3.DatabaseError if one has changed since it was written."""
    layouts = dict(connection.execute("SELECT number, CAST(layout AS BLOB) FROM layouts"))
    if any(number != _layout_number(layout) for number, layout in layouts.items()):
        raise sqlite3.DatabaseError("a layout has changed since it was written")
    return {number: layout.decode() for number, layout in layouts.items()}


def _insert(connection: sqlite3.Connection, name: str, size: int, records: Sequence[RecordEntry]) -> None:
    number = connection.execute("INSERT INTO shards (name, size) VALUES (?, ?)", (name, size)).lastrowid
    layouts = {}
    for layout in {record.layout for record in records}:
        layouts[layout] = _layout_number(layout.encode())
        connection.execute("INSERT OR IGNORE INTO layouts VALUES (?, ?)", (layouts[layout], layout))
    rows = [(record.key, number, layouts[record.layout], record.offset, record.size, record.crc) for record in records]
    connection.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?)", rows)


def _layout_number(layout: bytes) -> int:
    """A layout is numbered by its checksum, so that a flipped bit in a record's row does not lead to the layout of another shape."""
    return zlib.crc32(layout) & 0x7FFFFFFF


def _delete(connection: sqlite3.Connection, shard: Shard) -> None:
    connection.execute(_NEW_REVISION)
    connection.execute("DELETE FROM records WHERE shard = ?", (shard.number,))
    connection.execute("DELETE FROM shards WHERE number = ?", (shard.number,))
