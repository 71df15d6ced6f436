"""The catalogue: every file of every dataset, with an image's size and captions, or the reason why it is not used.

It is a SQLite database in the run's cache folder, never in a data folder. A row holds what was read from the file, valid while the file's
size and modification time stay the same, and the decision about the image under the dataset's current settings. So a scan opens only
files that are new or have changed.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.data.base.sample import ROLES, LeftOut, Sample, Size
from helpers.storage.database import DamagedDatabaseError, Database, damaged_rows, guard

_VERSION = 3
_REMEDY = "move it away, and the next start builds a new one from the images"
FROM_TABLE = 2  # value of `was_read` when an image's size came from a table; 1 when the file itself was opened

_SCHEMA = """
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    dataset TEXT NOT NULL,
    key TEXT NOT NULL,
    kind TEXT NOT NULL,             -- image, caption or other
    stem TEXT NOT NULL,             -- the key without its extension: an image and its caption file share it
    size INTEGER NOT NULL,          -- bytes; if size, modified_ns and etag are unchanged, so is the file
    modified_ns INTEGER NOT NULL,
    etag TEXT NOT NULL,
    was_read INTEGER NOT NULL DEFAULT 0,
    width INTEGER, height INTEGER,  -- of an image, after EXIF rotation
    text TEXT,                      -- of a caption file; for an image, a JSON list of its captions in a table ...
    text_problem TEXT,              -- ... or the reason why the table has none
    problem TEXT,                   -- the reason why the file can never be used, whatever the settings
    undecodable TEXT,               -- the reason why the pixels could not be decoded, found while encoding
    content TEXT,                   -- SHA-256 of the bytes, stored by whoever reads the whole file
    captions TEXT,                  -- the decision: a JSON list of the captions that the image is trained with, at least one ...
    left_out TEXT,                  -- ... or the reason why the image is left out
    checksum INTEGER,               -- of the row: see `Catalogue.forget_damaged`
    UNIQUE (dataset, key)
);
CREATE INDEX files_by_stem ON files (dataset, stem, kind, key);
CREATE INDEX files_unread ON files (dataset, id) WHERE was_read = 0;
CREATE INDEX files_undecodable ON files (dataset) WHERE undecodable IS NOT NULL;
CREATE TABLE listings (dataset TEXT PRIMARY KEY, digest TEXT NOT NULL);  -- digest of the listing that the rows agree with
CREATE TABLE verdicts (dataset TEXT PRIMARY KEY, rules TEXT NOT NULL, used INTEGER NOT NULL, left_out TEXT NOT NULL,
    checksum INTEGER);
CREATE TABLE marks (dataset TEXT PRIMARY KEY, mark TEXT NOT NULL);  -- see `Catalogue.revision`
CREATE TABLE joined (dataset TEXT PRIMARY KEY, stated TEXT NOT NULL, counts TEXT NOT NULL,
    checksum INTEGER);  -- the tables, as they were last read
"""
# companions: the companions of each image, by role. Both are rows of `files`; `version` is the companion's `file_version` when they were
# paired. masks: what `masks.py` measured. skipped: system folders that were not entered. failures: images that could not be encoded in
# this start of a run, which is how its processes tell each other.
_LATER_TABLES = """
CREATE TABLE IF NOT EXISTS companions
    (id INTEGER, role TEXT, companion INTEGER NOT NULL, version TEXT NOT NULL, checksum INTEGER, PRIMARY KEY (id, role));
CREATE TABLE IF NOT EXISTS masks
    (content TEXT, source TEXT, version INTEGER NOT NULL, mean REAL, brightest INTEGER, problem TEXT, checksum INTEGER,
    PRIMARY KEY (content, source));
CREATE TABLE IF NOT EXISTS skipped (dataset TEXT NOT NULL, folder TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS failures (pass INTEGER, id INTEGER, reason TEXT NOT NULL, undecodable INTEGER NOT NULL, PRIMARY KEY (pass, id));
"""
# Each row of these has a checksum. A change elsewhere only means that files are listed again or images judged again.
_GUARDED = {
    "files": (
        *("rowid", "dataset", "key", "kind", "stem", "size", "modified_ns", "etag", "was_read", "width", "height", "text"),
        *("text_problem", "problem", "undecodable", "content", "captions", "left_out"),
    ),
    "verdicts": ("rowid", "dataset", "rules", "used", "left_out"),
    "joined": ("rowid", "dataset", "stated", "counts"),
    "companions": ("rowid", "id", "role", "companion", "version"),
    "masks": ("rowid", "content", "source", "version", "mean", "brightest", "problem"),
}


def joined_companions(images: str, roles: Iterable[str] = ROLES) -> str:
    """SQL that joins the companions of the table `images`, under the names of their roles: columns of NULL where there is none."""
    return "".join(
        f" LEFT JOIN companions {role}_pair ON {role}_pair.id = {images}.id AND {role}_pair.role = '{role}'"
        f" LEFT JOIN files {role} ON {role}.id = {role}_pair.companion"
        for role in roles
    )


# The content of a sample: the hash of the image, then those of its companions. NULL while one is unknown. Not joined, since most queries
# of `used` do without it.
_CONTENT = "files.content" + "".join(
    f" || (SELECT CASE WHEN pair.id IS NULL THEN '' ELSE ' ' || other.content END FROM (SELECT 1)"
    f" LEFT JOIN companions pair ON pair.id = files.id AND pair.role = '{role}' LEFT JOIN files other ON other.id = pair.companion)"
    for role in ROLES
)
_VIEWS = f"""
CREATE TEMP VIEW used AS SELECT files.*, {_CONTENT} AS whole FROM files WHERE files.kind = 'image' AND files.captions IS NOT NULL;
CREATE TEMP VIEW used_captions AS SELECT used.dataset, used.key, each.value AS caption FROM used, json_each(used.captions) each;
"""


@dataclass(frozen=True)
class Columns:
    """The images in use of one dataset, in key order: row ids, and sizes after EXIF rotation. Arrays of equal length."""

    rows: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]


class Catalogue:
    """The files of all datasets. One process scans, any number read and store content hashes; threads may share one object.

    Images are addressed by their row id. An image is "in use" when the last scan found captions for it and no reason to leave it out.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the database, or create it. StorageError if that is impossible, DataError if the file is something else."""
        self.path = Path(path)
        self._database = Database(self.path, "NORMAL", _REMEDY)  # NORMAL: what a power failure loses is scanned again
        try:
            with self._database.connection() as connection:
                self._create_tables(connection)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def forget_damaged(self) -> int:
        """Remove the rows that are not as they were stored, so that the next scan reads their files again => their number.

        DamagedDatabaseError if the file's structure is damaged.
        """
        with self.transaction() as connection:
            damaged = damaged_rows(connection, _GUARDED)
            connection.executemany("DELETE FROM files WHERE id = ?", ((row,) for row in damaged.get("files", ())))
            if damaged:
                for table in ("listings", "verdicts", "joined", "companions", "masks", "marks"):
                    connection.execute(f"DELETE FROM {table}")
        return sum(map(len, damaged.values()))

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """What is written in the block is kept as a whole or not at all. Errors as for `Database`."""
        return self._database.transaction()

    # -- images in use, in key order -------------------------------------------------------------------------------------

    def columns(self, dataset: str) -> Columns:
        rows = self._database.rows("SELECT id, width, height FROM used WHERE dataset = ? ORDER BY key", dataset)
        table = np.fromiter((value for row in rows for value in row), np.int64).reshape(-1, 3)
        return Columns(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())

    def keys(self, dataset: str) -> Iterator[str]:
        for (key,) in self._database.rows("SELECT key FROM used WHERE dataset = ? ORDER BY key", dataset):
            yield key

    def contents(self, dataset: str) -> Iterator[str | None]:
        """For each image the SHA-256 of its file in hex, followed by a space and that of each companion it has.

        None if one of the files has not been read since it was new or changed.
        """
        for (content,) in self._database.rows("SELECT whole FROM used WHERE dataset = ? ORDER BY key", dataset):
            yield content

    def captions(self, dataset: str) -> Iterator[str]:
        """Every distinct caption of the dataset, sorted."""
        for (caption,) in self._database.rows("SELECT DISTINCT caption FROM used_captions WHERE dataset = ? ORDER BY caption", dataset):
            yield caption

    def captions_by_image(self, dataset: str) -> Iterator[str]:
        """The captions of each image as a JSON list."""
        for (captions,) in self._database.rows("SELECT captions FROM used WHERE dataset = ? ORDER BY key", dataset):
            yield captions

    def revision(self, dataset: str) -> str:
        """A random token, replaced whenever the images in use, their sizes, captions or contents may have changed."""
        return _value(self._database.row("SELECT mark FROM marks WHERE dataset = ?", dataset), "")

    # -- single images ---------------------------------------------------------------------------------------------------

    def sample(self, row: int) -> Sample:
        """One image. It has no captions if it is left out. KeyError if there is no such row."""
        dataset, key, width, height, captions = self._known_row("SELECT dataset, key, width, height, captions FROM files", row)
        return Sample(dataset, key, Size(width, height), tuple(json.loads(captions or "[]")))

    def file_version(self, row: int) -> str:
        """Size, modification time and etag, as text: while it stays the same, so does the file. KeyError if there is no such row."""
        return "{} {} {}".format(*self._known_row("SELECT size, modified_ns, etag FROM files", row))

    def content(self, row: int) -> str | None:
        """The entry of one image in `contents`. KeyError if there is no such row."""
        return self._known_row(f"SELECT {_CONTENT} FROM files", row)[0]

    def with_content_of(self, row: int) -> set[int]:
        """The rows of the dataset with the same content as this one, as far as contents are known. Includes the row itself."""
        own = f"SELECT files.dataset, files.content, {_CONTENT} whole FROM files WHERE files.id = ?"
        query = (
            f"SELECT files.id FROM files JOIN ({own}) own"
            f" ON files.dataset = own.dataset AND files.content = own.content AND {_CONTENT} = own.whole"
        )
        return {int(row)} | {other for (other,) in self._database.rows(query, int(row))}

    def set_content(self, digests: Iterable[tuple[int, str]]) -> None:
        """Store the SHA-256 (hex) of images and companions, as (row, digest) pairs, in one transaction."""
        with self.transaction() as connection:
            connection.executemany("UPDATE files SET content = ? WHERE id = ?", ((digest, int(row)) for row, digest in digests))
            connection.execute("UPDATE marks SET mark = ?", (new_token(),))

    def companion(self, row: int, role: str) -> Sample | None:
        """The companion that the last scan paired an image with."""
        paired = self.companion_row(row, role)
        return None if paired is None else self.sample(paired)

    def companion_row(self, row: int, role: str) -> int | None:
        """The row of that companion."""
        query = "SELECT companion FROM companions WHERE id = ? AND role = ?"
        found: int | None = _value(self._database.row(query, int(row), role), None)
        return found

    def unread_files(self, row: int) -> list[int]:
        """Of an image and its companions, the rows whose content hash is unknown."""
        names = ("files", *ROLES)
        found = self._known_row(
            f"SELECT {', '.join(f'{name}.id, {name}.content' for name in names)} FROM files {joined_companions('files')}", row
        )
        return [int(file) for file, content in zip(found[::2], found[1::2], strict=True) if file is not None and content is None]

    # -- images that could not be encoded --------------------------------------------------------------------------------

    def add_failure(self, number: int, row: int, reason: str, undecodable: bool) -> None:
        """Record, for all processes, that an image has no latents for an epoch, or for every epoch.

        `number` is that of the `EpochLatents`. `undecodable` is true if no machine could encode this file.
        """
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", (number, int(row), reason, undecodable))

    def has_failed(self, number: int, row: int) -> bool:
        return self._database.row("SELECT 1 FROM failures WHERE pass = ? AND id = ?", number, int(row)) is not None

    def failed(self, number: int) -> set[int]:
        """The rows of `add_failure` calls with this number."""
        return {row for (row,) in self._database.rows("SELECT id FROM failures WHERE pass = ?", number)}

    def failures(self) -> dict[int, str]:
        """For every image that failed, row => reason as "kind: detail"."""
        return dict(self._database.rows("SELECT id, reason FROM failures ORDER BY id, pass"))

    def forget_failures(self) -> None:
        """Called when a run starts: images that failed in an earlier start are tried again."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM failures")

    def leave_out_undecodable(self) -> None:
        """Make the scans of later runs leave out the images that turned out to be undecodable. The files stay as they are."""
        with self.transaction() as connection:
            found = "SELECT id, reason FROM failures WHERE undecodable"
            connection.execute(f"UPDATE files SET undecodable = f.reason FROM ({found}) f WHERE files.id = f.id")
            connection.execute(f"DELETE FROM verdicts WHERE dataset IN (SELECT dataset FROM files JOIN ({found}) f ON files.id = f.id)")

    def undecodable(self, dataset: str) -> list[str]:
        """The keys of the images that are left out because an earlier run could not decode them."""
        query = "SELECT key FROM files WHERE dataset = ? AND undecodable IS NOT NULL AND left_out = undecodable ORDER BY key"
        return [key for (key,) in self._database.rows(query, dataset)]

    # -- for reports -----------------------------------------------------------------------------------------------------

    def left_out(self, dataset: str) -> Iterator[LeftOut]:
        """Every file that was found and is not used, in key order, with its reason as "kind: detail"."""
        query = "SELECT key, left_out FROM files WHERE dataset = ? AND left_out IS NOT NULL ORDER BY key"
        for key, reason in self._database.rows(query, dataset):
            yield LeftOut(key, reason)

    def example_left_out(self, dataset: str) -> LeftOut:
        """A file that is left out: an image, if there is one, with the most frequent reason of images."""
        kind = "substr(left_out, 1, instr(left_out || ':', ':'))"
        query = (
            "SELECT key, left_out FROM files WHERE dataset = ? AND left_out IS NOT NULL"
            f" ORDER BY kind <> 'image', count(*) OVER (PARTITION BY kind, {kind}) DESC, key LIMIT 1"
        )
        found = self._database.row(query, dataset)
        assert found is not None, f"no file of {dataset} is left out"
        return LeftOut(*found)

    def first_image(self, dataset: str) -> str | None:
        """The first key of an image file, used or not."""
        query = "SELECT key FROM files WHERE dataset = ? AND kind = 'image' ORDER BY key LIMIT 1"
        found: str | None = _value(self._database.row(query, dataset), None)
        return found

    def skipped_folders(self, dataset: str) -> list[str]:
        """System folders that the last scan found and did not enter, sorted."""
        return [folder for (folder,) in self._database.rows("SELECT folder FROM skipped WHERE dataset = ? ORDER BY folder", dataset)]

    def totals(self, dataset: str) -> tuple[int, Counter[str]]:
        """From the last scan: the number of images in use, and the number of files left out for each kind of reason."""
        used, kinds = self._database.row("SELECT used, left_out FROM verdicts WHERE dataset = ?", dataset) or (0, "{}")
        return used, Counter(json.loads(kinds))

    def copies(self, dataset: str) -> Iterator[list[str]]:
        """Groups of keys whose files have the same bytes, among the images in use that have been read and can be decoded."""
        rows = self._database.rows(
            "SELECT content, key FROM used WHERE dataset = ? AND undecodable IS NULL AND content IN (SELECT content FROM used"
            " WHERE dataset = ? AND undecodable IS NULL AND content IS NOT NULL GROUP BY content HAVING count(*) > 1) ORDER BY key",
            dataset,
            dataset,
        )
        groups: dict[str, list[str]] = {}
        for content, key in rows:
            groups.setdefault(content, []).append(key)
        yield from groups.values()

    def unread(self, dataset: str) -> int:
        """The number of images in use whose content, or a companion's, is not known yet."""
        query = "SELECT count(*) FROM used WHERE dataset = ? AND undecodable IS NULL AND whole IS NULL"
        return int(_value(self._database.row(query, dataset), 0))

    def caption_counts(self, dataset: str) -> Iterator[tuple[str, int]]:
        """Every distinct caption and the number of its images, sorted by caption."""
        yield from self._database.rows(
            "SELECT each.value, count(*) FROM used, json_each(used.captions) each WHERE dataset = ?"
            " GROUP BY each.value ORDER BY each.value",
            dataset,
        )

    def endings_beside_images(self, dataset: str) -> dict[str, int]:
        """The numbers of files that are neither images nor captions and have the name of an image, by extension in lower case."""
        query = (
            "SELECT lower(substr(key, length(stem) + 1)) ending, count(*) FROM files WHERE dataset = ? AND kind = 'other' AND EXISTS"
            " (SELECT 1 FROM files image WHERE image.dataset = files.dataset AND image.stem = files.stem AND image.kind = 'image')"
            " GROUP BY ending ORDER BY ending"
        )
        return dict(self._database.rows(query, dataset))

    def shared_files(self, dataset: str, other: str) -> int:
        """The number of images in use in both datasets that are one file, under whatever path."""
        query = (
            "SELECT count(*) FROM (SELECT DISTINCT size, modified_ns, etag FROM files WHERE dataset = ? AND captions IS NOT NULL"
            " AND etag <> '' INTERSECT SELECT size, modified_ns, etag FROM files WHERE dataset = ? AND captions IS NOT NULL)"
        )
        return int(_value(self._database.row(query, dataset, other), 0))

    def first_folders(self, dataset: str) -> list[str]:
        """The first folder in the path of every image in use, sorted; "" for images that are in none."""
        query = "SELECT DISTINCT substr(key, 1, max(instr(key, '/') - 1, 0)) folder FROM used WHERE dataset = ? ORDER BY folder"
        return [folder for (folder,) in self._database.rows(query, dataset)]

    def caption_files(self, dataset: str) -> int:
        """The number of caption files that have an image of the same name, whether or not the settings read them."""
        query = "SELECT count(*) FROM files WHERE dataset = ? AND kind = 'caption' AND left_out IS NULL"
        return int(_value(self._database.row(query, dataset), 0))

    # -- for the scan ----------------------------------------------------------------------------------------------------

    def listing(self, dataset: str) -> str:
        """The digest of the listing that the rows of a dataset agree with; a new token each time while a file of it is in doubt."""
        return _value(self._database.row("SELECT digest FROM listings WHERE dataset = ?", dataset), new_token())

    def was_listed(self, dataset: str) -> bool:
        """Whether the rows agree with a listing of the dataset, so that no file is known to be missing or in doubt."""
        return self._database.row("SELECT 1 FROM listings WHERE dataset = ?", dataset) is not None

    def _known_row(self, select: str, row: int) -> tuple:
        """The columns of one file. KeyError if there is no such row."""
        found = self._database.row(f"{select} WHERE files.id = ?", int(row))
        if found is None:
            raise KeyError(row)
        return found

    def _create_tables(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0 and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version != _VERSION:
            raise DamagedDatabaseError(f"{self.path} is not a catalogue of this version; {_REMEDY}.")
        connection.executescript(_LATER_TABLES + _VIEWS)
        guard(connection, _GUARDED)


def new_token() -> str:
    """A random value, for `Catalogue.revision`."""
    return secrets.token_hex(8)


def _value(row: tuple | None, default: object) -> Any:
    """The only column of a row."""
    return default if row is None else row[0]
