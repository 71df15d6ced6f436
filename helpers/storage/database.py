"""A SQLite file that several processes of one machine, and several threads, may read and write at the same time.

The write-ahead log makes this possible. It needs shared memory, so the file must not be on a network file system that several machines
use at once.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from helpers.errors import DataError, StorageError

_WAIT_SECONDS = 60  # for another process's transaction
_ROWS_AT_ONCE = 4096
_FILES = ("", "-wal", "-shm")  # what SQLite appends to the name
_open: weakref.WeakSet[Database] = weakref.WeakSet()


class DamagedDatabaseError(DataError):
    """The file is no SQLite database, or its content is damaged."""


class Database:
    """One connection, shared by the threads of a process.

    `synchronous` is SQLite's: FULL makes every commit durable, NORMAL may lose the last commits when the power fails. Neither damages the
    file. `remedy` ends the message about a damaged file: what the user should do.
    Every method raises StorageError where the disk or another process is the reason, and DamagedDatabaseError for a damaged file.
    """

    def __init__(self, path: Path, synchronous: Literal["FULL", "NORMAL"], remedy: str) -> None:
        self.path = path
        self._remedy = remedy
        self._lock = threading.RLock()
        self._closed = False
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()  # of `rows`; one that is open keeps the file open
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # isolation_level None: no statement opens a transaction by itself, `transaction` does.
            self._connection = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise StorageError(f"{path} could not be opened: {error}.") from error
        try:
            with self.connection() as connection:
                _use_write_ahead_log(connection)
                connection.execute(f"PRAGMA synchronous = {synchronous}")
        except BaseException:
            self.close()
            raise
        _open.add(self)
        weakref.finalize(self, self._connection.close)  # a connection is part of a cycle, so it outlives its last user

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for cursor in list(self._cursors):
                cursor.close()
            self._connection.close()

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone until the block ends. Every statement is its own transaction."""
        with self._lock:
            if self._closed:
                raise StorageError(f"{self.path} was closed while it was in use.")
            try:
                yield self._connection
            except sqlite3.OperationalError as error:
                raise StorageError(f"{self.path} could not be read or written: {error}.") from error
            except sqlite3.DatabaseError as error:
                if type(error) is not sqlite3.DatabaseError:  # its subclasses, such as IntegrityError, are mistakes in our SQL
                    raise
                raise DamagedDatabaseError(f"{self.path} is damaged or no SQLite database ({error}); {self._remedy}.") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection as above; everything written in the block is kept when it ends, or nothing when it raises."""
        with self.connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite rolls back by itself when the disk is full
                    connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """The rows of a SELECT, in bounded memory. Other threads may use the connection between two blocks of rows."""
        with self.connection() as connection:
            cursor = connection.execute(query, values)
            self._cursors.add(cursor)
        while True:
            with self.connection():
                block = cursor.fetchmany(_ROWS_AT_ONCE)
            if not block:
                return
            yield from block

    def row(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """The first row of a SELECT, or None."""
        with self.connection() as connection:
            return connection.execute(query, values).fetchone()


def close_databases() -> None:
    """Close every database of this process, before it ends without cleaning up. Then each file is complete without its -wal."""
    for database in list(_open):
        database.close()


def guard(connection: sqlite3.Connection, tables: Mapping[str, Sequence[str]]) -> None:
    """Keep a checksum of each row of some tables from now on, in their column `checksum`. `tables`: name => the other columns, and "rowid".

    A row written by a program that did not call this has none.
    """
    connection.create_function("crc32", 1, zlib.crc32, deterministic=True)
    for table, columns in tables.items():
        renew = f"BEGIN UPDATE {table} SET checksum = {_checksum(columns)} WHERE rowid = NEW.rowid; END"
        connection.execute(f"CREATE TEMP TRIGGER {table}_inserted AFTER INSERT ON main.{table} {renew}")
        changed = ", ".join(column for column in columns if column != "rowid")
        connection.execute(f"CREATE TEMP TRIGGER {table}_updated AFTER UPDATE OF {changed} ON main.{table} {renew}")


def damaged_rows(connection: sqlite3.Connection, tables: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """The rows (rowid) of guarded tables that differ from what was stored, by table; only tables that have such rows.

    DamagedDatabaseError, through `Database.connection`, if the structure of the file is damaged.
    """
    [(verdict,)] = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    damaged = {}
    for table, columns in tables.items():
        found = connection.execute(f"SELECT rowid FROM {table} WHERE checksum IS NOT {_checksum(columns)}").fetchall()
        if found:
            damaged[table] = [row for (row,) in found]
    return damaged


def _checksum(columns: Sequence[str]) -> str:
    """SQL of the CRC-32 of some columns. As bytes, because damaged text may be no UTF-8. (`printf` is the fastest way to join them.)"""
    return f"crc32(CAST(printf('{'%s|' * len(columns)}', {', '.join(columns)}) AS BLOB))"


def remove_database(path: Path) -> None:
    """Delete a database that no process has open, and the files SQLite keeps beside it."""
    for suffix in _FILES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """SQLite's timeout does not cover this statement: when several processes open a new file at once, all but one get "busy"."""
    give_up = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.05)
