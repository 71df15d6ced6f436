"""Join the rows of tables to the images they name. SQLite does the join, so a million rows need little memory."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.data.base.sample import Size
from helpers.data.catalogue.catalogue import FROM_TABLE, Catalogue
from helpers.data.catalogue.loose_names import match_loosely
from helpers.data.catalogue.tables import TableRule, read_rows
from helpers.errors import DataError, Interrupted, StorageError
from helpers.storage.backend import SourceBackend
from helpers.storage.local import LocalSource

_VERSION = 3  # of how names and sizes are compared; tables are joined again when it changes
_COMPARED = 64  # images whose headers are compared with the sizes in a table

SizeOf = Callable[[str], Size | None]  # the size of the image of a key, from its header; None if it cannot be read


@dataclass(frozen=True)
class JoinedTable:
    """How many rows of a table were used."""

    path: str
    rows: int
    unnamed: int  # rows without a file name
    without_image: int  # rows that name no image of the dataset
    example: str = ""  # the name in one of these rows
    compared: int = 0  # images whose headers were compared with the table's sizes
    swapped: int = 0  # of these, images whose width and height are exchanged: the table has sizes before EXIF rotation


def join_tables(
    backend: SourceBackend,
    dataset: str,
    tables: Sequence[TableRule],
    catalogue: Catalogue,
    size_of: SizeOf = lambda key: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[JoinedTable]:
    """Store captions and sizes from a dataset's tables in the rows of its images. If nothing has changed, no table is read.

    The sizes of some images are compared with `size_of`. If one of them is exchanged, the table was made without regard to EXIF rotation:
    then no size of it is stored, and the images count as not read.

    An image that a table does not name, or names twice, gets the reason. Values from tables that are no longer configured are removed.
    DataError if a table is missing or unusable, StorageError if its store fails.
    """
    versions = [_version(backend, dataset, table.path, catalogue) for table in tables]
    inputs = [[dataclasses.asdict(table), *version] for table, version in zip(tables, versions, strict=True)]
    stated = json.dumps([_VERSION, *inputs], sort_keys=True)
    with catalogue.transaction() as database:
        known = database.execute("SELECT stated, counts FROM joined WHERE dataset = ?", (dataset,)).fetchone()
        if known is not None and known[0] == stated:
            return [JoinedTable(**counts) for counts in json.loads(known[1])]
        if not any(table.width_column for table in tables):
            database.execute(
                "UPDATE files SET was_read = 0, width = NULL, height = NULL, problem = NULL, undecodable = NULL"
                f" WHERE dataset = ? AND was_read = {FROM_TABLE}",
                (dataset,),
            )
        joined = []
        root = str(getattr(backend, "root", backend.name))
        for table in tables:
            _load(database, backend, table, should_stop)
            joined.append(_join(database, dataset, table, root))
            if table.width_column:
                joined[-1] = _without_swapped_sizes(database, dataset, joined[-1], size_of)
        counts = json.dumps([dataclasses.asdict(table) for table in joined])
        database.execute("INSERT OR REPLACE INTO joined (dataset, stated, counts) VALUES (?, ?, ?)", (dataset, stated, counts))
        database.execute("DELETE FROM verdicts WHERE dataset = ?", (dataset,))
    return joined


def _place(backend: SourceBackend, path: str) -> tuple[SourceBackend, str]:
    """The store and key of a table: an absolute path is on this machine, any other path is a key of the dataset's source."""
    return (LocalSource(Path(path).parent), Path(path).name) if os.path.isabs(path) else (backend, path)


def _version(backend: SourceBackend, dataset: str, path: str, catalogue: Catalogue) -> tuple[int, int, str]:
    """Size, modification time and etag of a table. DataError if it is missing."""
    if os.path.isabs(path):
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"dataset {dataset!r}: the table {path} cannot be opened: {error.strerror}; check its path.") from error
        return found.st_size, found.st_mtime_ns, f"{found.st_ctime_ns}-{found.st_ino}"
    with catalogue.transaction() as database:
        listed = database.execute("SELECT size, modified_ns, etag FROM files WHERE dataset = ? AND key = ?", (dataset, path)).fetchone()
    if listed is None:
        raise DataError(
            f"dataset {dataset!r}: there is no table {path} in {backend.name}; check its path, which is relative to that place."
        )
    return listed


def _load(database: sqlite3.Connection, backend: SourceBackend, table: TableRule, should_stop: Callable[[], bool]) -> None:
    """Read a table into `temp.row`. `temp.named` gets each name once, with its first row and the number of its rows."""
    database.execute("DROP TABLE IF EXISTS temp.row")
    database.execute(
        "CREATE TEMP TABLE row (id INTEGER PRIMARY KEY, name TEXT, is_number INTEGER, width INTEGER, height INTEGER, size_problem TEXT,"
        " captions TEXT, caption_problem TEXT)"
    )
    source, key = _place(backend, table.path)
    try:
        with source.open(key) as stream:
            for rows in read_rows(stream, table):
                database.executemany("INSERT INTO temp.row VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)
                if should_stop():
                    raise Interrupted("stopped while a table was read; start again to go on")
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"the table {table.path} cannot be opened: {error.strerror or error}; check its path.") from error
    except OSError as error:
        raise StorageError(f"{source.name}: {key} could not be read: {error.strerror or error}") from error
    database.execute("DROP TABLE IF EXISTS temp.named")
    database.execute(
        "CREATE TEMP TABLE named AS SELECT name, min(id) AS row, count(*) AS copies FROM temp.row WHERE name IS NOT NULL GROUP BY name"
    )
    database.execute("CREATE UNIQUE INDEX temp.named_by_name ON named (name)")


def _join(database: sqlite3.Connection, dataset: str, table: TableRule, root: str) -> JoinedTable:
    (rows, unnamed, numbers) = database.execute(
        "SELECT count(*), count(*) - count(name), coalesce(sum(is_number), 0) FROM temp.row"
    ).fetchone()
    by_key, by_stem = _identifiers(table, all_numbers=numbers > 0 and numbers == rows - unnamed)
    database.execute("DROP TABLE IF EXISTS temp.matched")
    database.execute(
        "CREATE TEMP TABLE matched AS SELECT f.id AS file, coalesce(k.row, s.row) AS row, coalesce(k.copies, s.copies) AS copies"
        f" FROM files f LEFT JOIN temp.named k ON k.name = {by_key} LEFT JOIN temp.named s ON k.row IS NULL AND s.name = {by_stem}"
        " WHERE f.dataset = ? AND f.kind = 'image'",
        (dataset,),
    )
    match_loosely(database, root, table.includes_extension)
    unmatched = "SELECT name FROM temp.named WHERE row NOT IN (SELECT row FROM temp.matched WHERE row IS NOT NULL) ORDER BY row LIMIT 1"
    example = database.execute(unmatched).fetchone()
    problem = (
        "CASE WHEN m.row IS NULL THEN 'not in the table: ' || :path || ' has no row of this name' || :example"
        " WHEN m.copies > 1 THEN 'several rows: ' || :path || ' has ' || m.copies || ' rows of this name'"
        " ELSE r.{} END"
    )
    changes = []
    if table.width_column:
        # An image is undecodable if its size in the table is wrong. With another size, it is tried again.
        changes += [
            "undecodable = CASE WHEN (files.width, files.height) IS (r.width, r.height) THEN undecodable END",
            f"was_read = {FROM_TABLE}, width = r.width, height = r.height, problem = {problem.format('size_problem')}",
        ]
    if table.caption_column:
        changes.append(f"text = r.captions, text_problem = {problem.format('caption_problem')}")
    database.execute(
        f"UPDATE files SET {', '.join(changes)} FROM temp.matched m LEFT JOIN temp.row r ON r.id = m.row WHERE files.id = m.file",
        {"path": table.path, "example": f"; a row that names no image has {example[0]!r}" if example else ""},
    )
    (named_rows,) = database.execute(
        "SELECT coalesce(sum(copies), 0) FROM temp.named WHERE row IN (SELECT row FROM temp.matched WHERE row IS NOT NULL)"
    ).fetchone()
    for name in ("row", "named", "matched"):
        database.execute(f"DROP TABLE temp.{name}")
    return JoinedTable(table.path, rows, unnamed, rows - unnamed - named_rows, example[0] if example else "")


def _without_swapped_sizes(database: sqlite3.Connection, dataset: str, joined: JoinedTable, size_of: SizeOf) -> JoinedTable:
    """Compare an even sample of headers with the sizes just stored, and forget all of these if one is exchanged."""
    stored = f"FROM files WHERE dataset = ? AND kind = 'image' AND was_read = {FROM_TABLE} AND problem IS NULL AND width <> height"
    (count,) = database.execute(f"SELECT count(*) {stored}", (dataset,)).fetchone()
    numbered = f"SELECT key, width, height, row_number() OVER (ORDER BY key) - 1 AS number {stored}"
    sample = database.execute(
        f"SELECT key, width, height FROM ({numbered}) WHERE number * {_COMPARED} / ? <> (number - 1) * {_COMPARED} / ? OR number = 0",
        (dataset, max(count, _COMPARED), max(count, _COMPARED)),
    ).fetchall()
    found = [(size, (width, height)) for key, width, height in sample if (size := size_of(key)) is not None]
    swapped = sum((size.height, size.width) == told for size, told in found)
    if swapped:
        database.execute(
            "UPDATE files SET was_read = 0, width = NULL, height = NULL, problem = NULL, undecodable = NULL"
            f" WHERE dataset = ? AND kind = 'image' AND was_read = {FROM_TABLE}",
            (dataset,),
        )
    return dataclasses.replace(joined, compared=len(found), swapped=swapped)


def _identifiers(table: TableRule, all_numbers: bool) -> tuple[str, str]:
    """SQL for what a table's names are compared with: first the key of the file, then the key without its extension.

    If all names are numbers, leading zeros of file names are ignored: 000123.jpg is 123.
    """
    stem = "f.stem"
    if all_numbers:
        digits = "f.stem NOT GLOB '*[^0-9]*' AND length(f.stem) BETWEEN 1 AND 18"
        stem = f"CASE WHEN {digits} THEN CAST(CAST(f.stem AS INTEGER) AS TEXT) ELSE f.stem END"
    return "NULL" if table.includes_extension is False else "f.key", "NULL" if table.includes_extension else stem
