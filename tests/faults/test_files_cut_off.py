"""A shard of the cache that is cut off or removed while it is mapped; databases of a run that has ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.data.cache.cache import Cache, DamagedRecordError, Writer, record_key
from helpers.storage.database import Database, close_databases
from tests.data.test_cache import record


def test_a_mapped_shard_that_is_cut_off_is_a_damaged_record_and_no_bus_error(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with Writer(cache) as writer:
        writer.add(record_key("a"), record(1))
    assert cache.get(record_key("a")) is not None  # it is mapped now
    [shard] = tmp_path.glob("*.safetensors")
    os.truncate(shard, 0)
    with pytest.raises(DamagedRecordError, match="bytes long"):
        cache.get(record_key("a"))
    cache.close()


def test_a_mapped_shard_that_is_removed_can_still_be_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with Writer(cache) as writer:
        writer.add(record_key("a"), record(1))
    assert cache.get(record_key("a")) is not None
    [shard] = tmp_path.glob("*.safetensors")
    shard.unlink()
    assert cache.get(record_key("a")) is not None
    cache.close()


def test_databases_are_complete_without_their_logs_when_a_run_has_ended(tmp_path: Path) -> None:
    database = Database(tmp_path / "index.sqlite", "FULL", "start again")
    with database.transaction() as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (1)")
    half_read = database.rows("SELECT x FROM t UNION ALL SELECT x FROM t")
    next(half_read)
    assert (tmp_path / "index.sqlite-wal").stat().st_size > 0
    close_databases()
    assert [path.name for path in tmp_path.iterdir()] == ["index.sqlite"]
    forgotten = Database(tmp_path / "index.sqlite", "FULL", "start again")
    with forgotten.transaction() as connection:
        connection.execute("UPDATE t SET x = 1")
    del forgotten, connection
    assert [path.name for path in tmp_path.iterdir()] == ["index.sqlite"]
    again = Database(tmp_path / "index.sqlite", "FULL", "start again")
    assert again.row("SELECT x FROM t") == (1,)
    again.close()
