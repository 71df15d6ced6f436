"""What is in the data sets: every file found once, its size and caption, or the reason why it is left out.

A SQLite database of ours, never in a data folder. It holds facts read from files, each valid as long as the file's size and
modification time are, and a verdict on each image under the data set's present rules. A scan opens only what is new or changed.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helpers.data.base.sample import LeftOut, Sample, Size
from helpers.errors import DataError, StorageError

_VERSION = 2
FROM_TABLE = 2  # `was_read` of an image whose size a table told; 1 of a file that was opened

_SCHEMA = """
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    dataset TEXT NOT NULL,
    key TEXT NOT NULL,
    kind TEXT NOT NULL,             -- image, caption or other
    stem TEXT NOT NULL,             -- the key without its ending: what an image and its caption share
    size INTEGER NOT NULL,          -- bytes; size, modified_ns and etag tell whether the file is the one that was read
    modified_ns INTEGER NOT NULL,
    etag TEXT NOT NULL,
    was_read INTEGER NOT NULL DEFAULT 0,
    width INTEGER, height INTEGER,  -- of an image as shown
    text TEXT,                      -- of a caption file; of an image a JSON list of the captions that a table has for it ...
    text_problem TEXT,              -- ... or why it has none
    problem TEXT,                   -- why the file cannot be used, whatever the rules
    undecodable TEXT,               -- why the pixels could not be decoded, found out while encoding
    content TEXT,                   -- SHA-256 of the bytes, filled in by whoever reads them all
    captions TEXT,                  -- the verdict: a JSON list of what the image is trained under, at least one ...
    left_out TEXT,                  -- ... or why it is not trained on
    UNIQUE (dataset, key)
);
CREATE INDEX files_by_stem ON files (dataset, stem, kind, key);
CREATE INDEX files_unread ON files (dataset, id) WHERE was_read = 0;
CREATE INDEX files_undecodable ON files (dataset) WHERE undecodable IS NOT NULL;
CREATE TABLE listings (dataset TEXT PRIMARY KEY, digest TEXT NOT NULL);  -- of the listing that the rows agree with
CREATE TABLE verdicts (dataset TEXT PRIMARY KEY, rules TEXT NOT NULL, used INTEGER NOT NULL, left_out TEXT NOT NULL);
CREATE TABLE marks (dataset TEXT PRIMARY KEY, mark TEXT NOT NULL);  -- another one after every change to images in use
CREATE TABLE joined (dataset TEXT PRIMARY KEY, stated TEXT NOT NULL, counts TEXT NOT NULL);  -- tables, as they were last read
"""
# Images that could not be encoded in the present life of a run: how its processes tell each other. And the condition of each image
# that has one, both as rows of `files`, with the version (see `Catalogue.version`) of the condition that the pair was made with.
_LATER_TABLES = """
CREATE TABLE IF NOT EXISTS pairs (id INTEGER PRIMARY KEY, condition INTEGER NOT NULL, version TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS failures (pass INTEGER, id INTEGER, reason TEXT NOT NULL, undecodable INTEGER NOT NULL, PRIMARY KEY (pass, id));
"""
# What a sample is made of: the hash of its image's bytes, and after it that of its condition's where it has one; NULL while one is unknown.
_WHOLE = "CASE WHEN pairs.id IS NULL THEN files.content ELSE files.content || ' ' || condition.content END"
_PAIRED = "files LEFT JOIN pairs ON pairs.id = files.id LEFT JOIN files condition ON condition.id = pairs.condition"


@dataclass(frozen=True)
class Columns:
    """The used images of one data set in key order: row ids and sizes as shown, arrays of equal length."""

    rows: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]


class Catalogue:
    """The store of samples. One process scans, any number read and add content hashes; threads may share one object."""

    def __init__(self, path: str | Path) -> None:
        """Opens the database, or makes it. StorageError when that is impossible, DataError when the file is another's."""
        self.path = Path(path)
        self._lock = threading.RLock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Transactions are explicit (isolation_level None); a second process waits for the first one's commit.
            self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise StorageError(f"{self.path} could not be opened: {error}") from error
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self.close()
            raise _explained(error, self.path) from error

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._database.close()

    # What the plan and the caches read: images in use, in key order.

    def columns(self, dataset: str) -> Columns:
        rows = self._select("SELECT id, width, height FROM used WHERE dataset = ? ORDER BY key", dataset)
        table = np.fromiter((value for row in rows for value in row), np.int64).reshape(-1, 3)
        return Columns(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())

    def keys(self, dataset: str) -> Iterator[str]:
        for (key,) in self._select("SELECT key FROM used WHERE dataset = ? ORDER BY key", dataset):
            yield key

    def contents(self, dataset: str) -> Iterator[str | None]:
        """SHA-256 of each image's bytes in hex, and that of its condition's after it where it has one.

        None where nobody has read one of the files yet, or it has changed since.
        """
        for (content,) in self._select("SELECT whole FROM used WHERE dataset = ? ORDER BY key", dataset):
            yield content

    def captions(self, dataset: str) -> Iterator[str]:
        """Each distinct caption that any image in use may be trained under, sorted."""
        for (caption,) in self._select("SELECT DISTINCT caption FROM used_captions WHERE dataset = ? ORDER BY caption", dataset):
            yield caption

    def captions_by_image(self, dataset: str) -> Iterator[str]:
        """The captions of each image in use as a JSON list, in key order."""
        for (captions,) in self._select("SELECT captions FROM used WHERE dataset = ? ORDER BY key", dataset):
            yield captions

    def sample(self, row: int) -> Sample:
        """One image by its row id, without captions where it is left out. KeyError when there is none."""
        found = next(self._select("SELECT dataset, key, width, height, captions FROM files WHERE id = ?", int(row)), None)
        if found is None:
            raise KeyError(row)
        dataset, key, width, height, captions = found
        return Sample(dataset, key, Size(width, height), tuple(json.loads(captions or "[]")))

    def content(self, row: int) -> str | None:
        """That of one image, or None when it is not known. KeyError when there is no such row."""
        found = next(self._select(f"SELECT {_WHOLE} FROM {_PAIRED} WHERE files.id = ?", int(row)), None)
        if found is None:
            raise KeyError(row)
        return found[0]

    def with_content_of(self, row: int) -> set[int]:
        """Rows of the data set's images that have the same content, as far as it is known; the row itself among them."""
        own = f"SELECT files.dataset, files.content, {_WHOLE} whole FROM {_PAIRED} WHERE files.id = ?"
        query = (
            f"SELECT files.id FROM {_PAIRED} JOIN ({own}) own"
            f" ON files.dataset = own.dataset AND files.content = own.content AND {_WHOLE} = own.whole"
        )
        return {int(row)} | {other for (other,) in self._select(query, int(row))}

    def set_content(self, digests: Iterable[tuple[int, str]]) -> None:
        """Remember the SHA-256 (hex) of the bytes of images and conditions, as (row, digest) pairs, in one transaction."""
        with self.transaction() as database:
            database.executemany("UPDATE files SET content = ? WHERE id = ?", ((digest, int(row)) for row, digest in digests))
            database.execute("UPDATE marks SET mark = ?", (new_mark(),))

    def condition(self, row: int) -> Sample | None:
        """The picture that an image was paired with by the last scan."""
        paired = self.condition_row(row)
        return None if paired is None else self.sample(paired)

    def condition_row(self, row: int) -> int | None:
        """The row of that picture."""
        return next(self._select("SELECT condition FROM pairs WHERE id = ?", int(row)), (None,))[0]

    def unread_files(self, row: int) -> list[int]:
        """Of an image and its condition, the rows of those whose bytes nobody has read."""
        query = f"SELECT files.id, files.content, condition.id, condition.content FROM {_PAIRED} WHERE files.id = ?"
        [(image, content, condition, condition_content)] = self._select(query, int(row))
        pairs = [(image, content), *([(condition, condition_content)] if condition is not None else [])]
        return [int(file) for file, known in pairs if known is None]

    # What could not be encoded.

    def add_failure(self, number: int, row: int, reason: str, undecodable: bool) -> None:
        """Tell all processes that an image has no latents in a pass; `undecodable` where no other machine could have made them."""
        with self.transaction() as database:
            database.execute("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", (number, int(row), reason, undecodable))

    def has_failed(self, number: int, row: int) -> bool:
        return next(self._select("SELECT 1 FROM failures WHERE pass = ? AND id = ?", number, int(row)), None) is not None

    def failed(self, number: int) -> set[int]:
        """Rows of the images that failed in a pass."""
        return {row for (row,) in self._select("SELECT id FROM failures WHERE pass = ?", number)}

    def failures(self) -> dict[int, str]:
        """Why each image failed that did in any pass, by row, as "kind: detail"."""
        return dict(self._select("SELECT id, reason FROM failures ORDER BY id, pass"))

    def forget_failures(self) -> None:
        """Begin a life of a run: what failed in an earlier one is tried again."""
        with self.transaction() as database:
            database.execute("DELETE FROM failures")

    def leave_out_undecodable(self) -> None:
        """Have the scans of later runs leave out the images that turned out undecodable. The files are not touched."""
        with self.transaction() as database:
            found = "SELECT id, reason FROM failures WHERE undecodable"
            database.execute(f"UPDATE files SET undecodable = f.reason FROM ({found}) f WHERE files.id = f.id")
            database.execute(f"DELETE FROM verdicts WHERE dataset IN (SELECT dataset FROM files JOIN ({found}) f ON files.id = f.id)")

    def undecodable(self, dataset: str) -> list[str]:
        """Keys of the images that are left out because an earlier run could not decode them."""
        query = "SELECT key FROM files WHERE dataset = ? AND undecodable IS NOT NULL AND left_out = undecodable ORDER BY key"
        return [key for (key,) in self._select(query, dataset)]

    def mark(self, dataset: str) -> str:
        """A word that stays the same as long as the images in use do: which they are, their sizes, captions and contents."""
        return next(self._select("SELECT mark FROM marks WHERE dataset = ?", dataset), ("",))[0]

    # What reports read.

    def left_out(self, dataset: str) -> Iterator[LeftOut]:
        """Every file found that is not trained on, in key order, with its reason as "kind: detail"."""
        for key, reason in self._select("SELECT key, left_out FROM files WHERE dataset = ? AND left_out IS NOT NULL ORDER BY key", dataset):
            yield LeftOut(key, reason)

    def totals(self, dataset: str) -> tuple[int, Counter[str]]:
        """The number of images in use, and how many files are left out for each kind of reason, as the last scan counted them."""
        used, kinds = next(self._select("SELECT used, left_out FROM verdicts WHERE dataset = ?", dataset), (0, "{}"))
        return used, Counter(json.loads(kinds))

    def listing(self, dataset: str) -> str:
        """A word for the listing that the rows of a data set agree with; another one each time where a file of it is in doubt."""
        return next(self._select("SELECT digest FROM listings WHERE dataset = ?", dataset), (new_mark(),))[0]

    def was_listed(self, dataset: str) -> bool:
        """Whether the rows agree with a listing of the data set, so that nothing is known to be missing or in doubt."""
        return next(self._select("SELECT 1 FROM listings WHERE dataset = ?", dataset), None) is not None

    # Of images whose pixels can be decoded, as far as that is known.

    def copies(self, dataset: str) -> Iterator[list[str]]:
        """Keys of images in use with equal bytes, of those whose bytes have been read; groups and keys in key order."""
        rows = self._select(
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
        """The number of images in use whose bytes, or whose condition's, nobody has read yet."""
        return next(self._select("SELECT count(*) FROM used WHERE dataset = ? AND undecodable IS NULL AND whole IS NULL", dataset))[0]

    def caption_counts(self, dataset: str) -> Iterator[tuple[str, int]]:
        """Each distinct caption in use and the number of its images, sorted by caption."""
        yield from self._select(
            "SELECT each.value, count(*) FROM used, json_each(used.captions) each WHERE dataset = ?"
            " GROUP BY each.value ORDER BY each.value",
            dataset,
        )

    def caption_files(self, dataset: str) -> int:
        """The number of caption files that stand beside an image, whether or not they are read."""
        query = "SELECT count(*) FROM files WHERE dataset = ? AND kind = 'caption' AND left_out IS NULL"
        return next(self._select(query, dataset))[0]

    def version(self, row: int) -> str:
        """What tells whether a file is the one that was scanned. KeyError when there is no such row."""
        found = next(self._select("SELECT size, modified_ns, etag FROM files WHERE id = ?", int(row)), None)
        if found is None:
            raise KeyError(row)
        return "{} {} {}".format(*found)

    # What the scan writes with.

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is written inside is kept, or none of it. A full disk is a StorageError."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield self._database
                except BaseException:
                    if self._database.in_transaction:  # SQLite rolls back by itself when the disk is full
                        self._database.execute("ROLLBACK")
                    raise
                self._database.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                raise _explained(error, self.path) from error

    def _select(self, query: str, *values: object) -> Iterator[tuple]:
        """Rows in bounded memory. The lock is held for a block of rows at a time."""
        with self._lock:
            cursor = self._database.execute(query, values)
        while True:
            with self._lock:
                block = cursor.fetchmany(4096)
            if not block:
                return
            yield from block

    def _prepare(self) -> None:
        database = self._database
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")  # WAL: a crash never corrupts; the last commits are read again
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == _VERSION:
            pass
        elif version == 0 and not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        else:
            raise DataError(f"{self.path} is not a catalogue of this version; move it away and it is built anew from the images.")
        database.executescript(_LATER_TABLES)
        database.execute(
            f"CREATE TEMP VIEW used AS SELECT files.*, {_WHOLE} AS whole FROM {_PAIRED}"
            " WHERE files.kind = 'image' AND files.captions IS NOT NULL"
        )
        database.execute(
            "CREATE TEMP VIEW used_captions AS SELECT used.dataset, used.key, each.value AS caption"
            " FROM used, json_each(used.captions) each"
        )


def new_mark() -> str:
    """A word that no mark was before."""
    return secrets.token_hex(8)


def _explained(error: sqlite3.DatabaseError, path: Path) -> Exception:
    """A full disk or a lock that is never freed is the machine's; a file that is no database is the user's to move away."""
    if isinstance(error, sqlite3.OperationalError):
        return StorageError(f"{path} could not be written: {error}")
    return DataError(f"{path} is damaged or no catalogue ({error}); move it away and it is built anew from the images.")
