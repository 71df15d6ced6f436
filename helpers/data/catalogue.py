"""What is in the data sets: every file found once, its size and caption, or the reason why it is left out.

A SQLite database of ours, never in a data folder. It holds facts read from files, each valid as long as the file's size and
modification time are, and a verdict on each image under the data set's present rules. A scan opens only what is new or changed.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helpers.data.sample import LeftOut, Sample, Size
from helpers.errors import DataError, StorageError

_VERSION = 1
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
    text TEXT,                      -- of a caption file
    problem TEXT,                   -- why the file cannot be used, whatever the rules
    undecodable TEXT,               -- why the pixels could not be decoded, found out while encoding
    content TEXT,                   -- SHA-256 of the bytes, filled in by whoever reads them all
    caption TEXT,                   -- the verdict: what the image is trained under ...
    left_out TEXT,                  -- ... or why it is not trained on
    UNIQUE (dataset, key)
);
CREATE INDEX files_by_stem ON files (dataset, stem, kind, key);
CREATE TABLE verdicts (dataset TEXT PRIMARY KEY, rules TEXT NOT NULL);
"""
# Images that could not be encoded in the present life of a run: how its processes tell each other.
_FAILURES = """
CREATE TABLE IF NOT EXISTS failures (pass INTEGER, id INTEGER, reason TEXT NOT NULL, undecodable INTEGER NOT NULL, PRIMARY KEY (pass, id));
"""


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
        """SHA-256 of each image's bytes in hex; None where nobody has read the file yet, or it has changed since."""
        for (content,) in self._select("SELECT content FROM used WHERE dataset = ? ORDER BY key", dataset):
            yield content

    def captions(self, dataset: str) -> Iterator[str]:
        """Each distinct caption in use, sorted."""
        for (caption,) in self._select("SELECT DISTINCT caption FROM used WHERE dataset = ? ORDER BY caption", dataset):
            yield caption

    def captions_by_image(self, dataset: str) -> Iterator[str]:
        """The caption of each image in use, in key order."""
        for (caption,) in self._select("SELECT caption FROM used WHERE dataset = ? ORDER BY key", dataset):
            yield caption

    def sample(self, row: int) -> Sample:
        """One image by its row id. KeyError when there is none."""
        found = next(self._select("SELECT dataset, key, width, height, caption FROM files WHERE id = ?", int(row)), None)
        if found is None:
            raise KeyError(row)
        dataset, key, width, height, caption = found
        return Sample(dataset, key, Size(width, height), (caption,))

    def content(self, row: int) -> str | None:
        """SHA-256 of one image's bytes in hex, or None when it is not known. KeyError when there is no such row."""
        found = next(self._select("SELECT content FROM files WHERE id = ?", int(row)), None)
        if found is None:
            raise KeyError(row)
        return found[0]

    def with_content_of(self, row: int) -> set[int]:
        """Rows of the data set's images that hold the same bytes, as far as they are known; the row itself among them."""
        query = "SELECT o.id FROM files f JOIN files o ON o.dataset = f.dataset AND o.content = f.content WHERE f.id = ?"
        return {int(row)} | {other for (other,) in self._select(query, int(row))}

    def set_content(self, digests: Iterable[tuple[int, str]]) -> None:
        """Remember the SHA-256 (hex) of images' bytes, as (row, digest) pairs, in one transaction."""
        with self.transaction() as database:
            database.executemany("UPDATE files SET content = ? WHERE id = ?", ((digest, int(row)) for row, digest in digests))

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

    # What reports read.

    def left_out(self, dataset: str) -> Iterator[LeftOut]:
        """Every file found that is not trained on, in key order, with its reason as "kind: detail"."""
        for key, reason in self._select("SELECT key, left_out FROM files WHERE dataset = ? AND left_out IS NOT NULL ORDER BY key", dataset):
            yield LeftOut(key, reason)

    def used(self, dataset: str) -> int:
        """The number of images in use."""
        return next(self._select("SELECT count(*) FROM used WHERE dataset = ?", dataset))[0]

    def left_out_kinds(self, dataset: str) -> Counter[str]:
        """How many files are left out for each kind of reason."""
        return Counter(entry.reason.partition(":")[0] for entry in self.left_out(dataset))

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
        database.executescript(_FAILURES)
        database.execute("CREATE TEMP VIEW used AS SELECT * FROM files WHERE kind = 'image' AND caption IS NOT NULL")


def _explained(error: sqlite3.DatabaseError, path: Path) -> Exception:
    """A full disk or a lock that is never freed is the machine's; a file that is no database is the user's to move away."""
    if isinstance(error, sqlite3.OperationalError):
        return StorageError(f"{path} could not be written: {error}")
    return DataError(f"{path} is damaged or no catalogue ({error}); move it away and it is built anew from the images.")
