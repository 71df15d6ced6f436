"""What the catalogue and the index of a cache share: several processes at once, transactions, and whose fault an error is."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from pathlib import Path

import pytest

from helpers.errors import StorageError
from helpers.storage.database import DamagedDatabaseError, Database, remove_database


def opened(path: Path) -> Database:
    database = Database(path, "NORMAL", "delete it")
    with database.connection() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS numbers (number INTEGER PRIMARY KEY)")
    return database


def add(path: Path, numbers: range) -> None:
    database = opened(path)
    for number in numbers:
        with database.transaction() as connection:
            connection.execute("INSERT INTO numbers VALUES (?)", (number,))


def numbers_in(database: Database) -> list[int]:
    return [number for (number,) in database.rows("SELECT number FROM numbers ORDER BY number")]


def test_processes_that_open_a_new_file_at_once_all_write_to_it(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    path = tmp_path / "new" / "numbers.sqlite"
    writers = [spawn.Process(target=add, args=(path, range(start, start + 50))) for start in (0, 50, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert numbers_in(opened(path)) == list(range(150))


def test_a_transaction_is_kept_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    database = opened(tmp_path / "numbers.sqlite")
    with database.transaction() as connection:
        connection.execute("INSERT INTO numbers VALUES (1)")
    with pytest.raises(KeyError), database.transaction() as connection:
        connection.execute("INSERT INTO numbers VALUES (2)")
        raise KeyError
    with pytest.raises(sqlite3.IntegrityError), database.transaction() as connection:  # a mistake in our SQL keeps its traceback
        connection.execute("INSERT INTO numbers VALUES (3)")
        connection.execute("INSERT INTO numbers VALUES (1)")
    assert numbers_in(database) == [1]
    assert (database.row("SELECT number FROM numbers"), database.row("SELECT number FROM numbers WHERE number > 1")) == ((1,), None)


def test_rows_come_while_other_threads_write(tmp_path: Path) -> None:
    database = opened(tmp_path / "numbers.sqlite")
    with database.transaction() as connection:
        connection.executemany("INSERT INTO numbers VALUES (?)", ((number,) for number in range(10_000)))
    rows = database.rows("SELECT number FROM numbers WHERE number < 10000 ORDER BY number")
    assert next(rows) == (0,)
    writer = threading.Thread(target=add, args=(database.path, range(10_000, 10_010)))
    writer.start()
    writer.join(60)
    assert not writer.is_alive() and len(list(rows)) == 9_999


def test_a_damaged_file_is_told_from_a_disk_that_fails(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_bytes(b"this is not a database" * 100)
    with pytest.raises(DamagedDatabaseError, match=r"text\.sqlite is damaged or no SQLite database .*; delete it\.$"):
        opened(tmp_path / "text.sqlite")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="could not be opened"):
        opened(tmp_path / "file" / "numbers.sqlite")
    database = opened(tmp_path / "numbers.sqlite")
    with pytest.raises(StorageError, match="could not be read or written: no such table"):
        list(database.rows("SELECT * FROM letters"))
    database.close()
    with pytest.raises(StorageError, match="was closed while it was in use"):
        database.row("SELECT 1")
    remove_database(database.path)
    remove_database(database.path)
    assert [path.name for path in tmp_path.glob("numbers.*")] == []
