"""Nothing that a run remembers is believed without a checksum of its bytes: what has changed is made again from the user's files."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from helpers.data.cache.cache import Cache, DamagedRecordError, Writer, record_key
from helpers.data.cache.index import INDEX
from helpers.data.catalogue.catalogue import _GUARDED, Catalogue
from tests.data.test_cache import record
from tests.faults.conftest import Miniature
from tests.harness import same_weights
from tests.runs.evidence import flip_byte

# Each changes the catalogue as a flipped bit would: without the run's code, which renews the checksum.
FLIPS = (
    """UPDATE files SET captions = '["a blue circle"]' WHERE key LIKE '%_00.png'""",
    "UPDATE files SET width = width + 64 WHERE key LIKE '%_01.png'",
    "UPDATE files SET key = 'elsewhere.png' WHERE key LIKE '%_02.png'",
    "UPDATE files SET content = replace(content, 'a', 'b') WHERE key LIKE '%_03.png'",
    "UPDATE files SET captions = CAST(x'ff' AS TEXT) WHERE key LIKE '%_03.png'",
    "UPDATE files SET width = CAST(width AS TEXT) || '0' WHERE key LIKE '%_03.png'",
    "UPDATE verdicts SET left_out = '{'",
)


def flip(cache: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(cache / "catalogue.sqlite")) as other, other:
        for statement in statements:
            assert other.execute(statement).rowcount == 1, statement


def swap_rows_of_the_plan(cache: Path) -> None:
    plan = np.load(cache / "plan" / "plan.npy")
    plan[[0, 1]] = plan[[1, 0]]
    np.save(cache / "plan" / "plan.npy", plan)


def flip_in_the_plan_tables(cache: Path) -> None:
    table = cache / "plan" / "plan.json"
    table.write_text(table.read_text().replace("64", "65", 1))


def flip_in_every_memo(cache: Path) -> None:
    memos = list(cache.rglob("*.memo"))
    assert len(memos) > 3
    for memo in memos:
        flip_byte(memo, -3)


def break_the_structure(cache: Path) -> None:
    with contextlib.closing(sqlite3.connect(cache / "catalogue.sqlite")) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    flip_byte(cache / "catalogue.sqlite", 4096 + 3)


def flip_in_the_catalogue(cache: Path) -> None:
    flip(cache, *FLIPS)


@pytest.fixture
def stopped(small: Miniature) -> Miniature:
    """A run whose "out" was stopped after half of its steps."""
    small.run(max_train_steps=2, use_ema=True)
    return small


def test_damage_in_what_a_run_remembers_changes_nothing(stopped: Miniature) -> None:
    undisturbed, cache = stopped.run("undisturbed", use_ema=True), stopped.output / "cache"
    kept = shutil.copytree(stopped.output, stopped.output.with_name("kept"))
    for damage in (swap_rows_of_the_plan, flip_in_the_plan_tables, flip_in_every_memo, flip_in_the_catalogue, break_the_structure):
        shutil.rmtree(stopped.output)
        shutil.copytree(kept, stopped.output)
        damage(cache)
        resumed = stopped.run(use_ema=True)
        assert same_weights(undisturbed, resumed), damage
        assert ("damaged" in resumed.printed) == (damage in (flip_in_the_catalogue, break_the_structure)), damage


def test_each_flip_in_the_catalogue_is_found(stopped: Miniature) -> None:
    cache = stopped.output / "cache"
    kept = shutil.copytree(cache, stopped.output.with_name("kept"))
    for statement in FLIPS:
        shutil.rmtree(cache)
        shutil.copytree(kept, cache)
        with Catalogue(cache / "catalogue.sqlite") as catalogue:
            assert catalogue.forget_damaged() == 0
        flip(cache, statement)
        with Catalogue(cache / "catalogue.sqlite") as catalogue:
            assert catalogue.forget_damaged() == 1, statement
            assert catalogue.forget_damaged() == 0


def test_every_column_that_is_remembered_has_a_part_in_the_checksum(tmp_path: Path) -> None:
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue, catalogue.transaction() as connection:
        for table, columns in _GUARDED.items():
            there = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
            assert there | {"rowid"} == {*columns, "checksum", *({"id"} & there)}


def test_the_layout_of_a_record_is_not_that_of_another_shape(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with Writer(cache) as writer:
        for number in range(2):
            writer.add(record_key(str(number)), record(number))
    with contextlib.closing(sqlite3.connect(tmp_path / INDEX)) as other, other:
        other.execute("UPDATE records SET layout = layout + 1")
    with pytest.raises(DamagedRecordError, match="has changed since it was written"):
        cache.get(record_key("0"))
    cache.close()
    with contextlib.closing(sqlite3.connect(tmp_path / INDEX)) as other, other:
        other.execute("UPDATE layouts SET layout = replace(layout, '1', '2')")
    again = Cache(tmp_path)
    assert "has been rebuilt from the shards" in again.notes[0]
    assert again.get(record_key("0")) is not None
