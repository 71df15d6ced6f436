"""A cache as it lies on disk, looked at without touching it: opening it as a run does would repair it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.data.cache import INDEX, SHARD_NAME
from helpers.data.shards import Placed
from helpers.errors import DataError


@dataclass(frozen=True)
class Shard:
    """A file of the index."""

    number: int
    name: str
    size: int  # bytes


class CacheView:
    """The index of a cache, read-only. DataError where there is none, or it cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        if not path.is_file():
            raise DataError(f"{path} is missing; the next run makes it again from the shards.")
        try:
            self._index = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
            self._index.execute("BEGIN")  # one state of the index for everything that is read, whatever runs write meanwhile
            damage = self._index.execute("PRAGMA quick_check(1)").fetchone()[0]
            self._layouts = dict(self._index.execute("SELECT number, layout FROM layouts"))
        except sqlite3.Error as error:
            raise DataError(f"{path} cannot be read ({error}); the next run makes it again from the shards.") from error
        if damage != "ok":
            raise DataError(f"{path} is damaged ({damage}); delete it, and the next run makes it again from the shards.")

    def __enter__(self) -> CacheView:
        return self

    def __exit__(self, *exception: object) -> None:
        self._index.close()

    def shards(self) -> list[Shard]:
        """In the order of their making."""
        return [Shard(*row) for row in self._index.execute("SELECT number, name, size FROM shards ORDER BY name")]

    def records(self, shard: Shard) -> list[Placed]:
        """What the index says of a shard, in the order of its bytes."""
        rows = self._index.execute("SELECT key, layout, offset, size, crc FROM records WHERE shard = ? ORDER BY offset", (shard.number,))
        return [Placed(key, self._layouts[layout], offset, size, crc) for key, layout, offset, size, crc in rows]

    def find(self, key: bytes) -> tuple[Shard, Placed] | None:
        """Where a record lies."""
        row = self._index.execute(
            "SELECT number, name, shards.size, layout, offset, records.size, crc FROM records JOIN shards ON shards.number = shard"
            " WHERE key = ?",
            (key,),
        ).fetchone()
        if row is None:
            return None
        return Shard(*row[:3]), Placed(key, self._layouts[row[3]], *row[4:])

    def origin(self, subject: str) -> dict[str, str] | None:
        """What the latest record of a subject was made of."""
        row = self._index.execute("SELECT facts FROM origins WHERE subject = ?", (subject,)).fetchone()
        return json.loads(row[0]) if row else None

    def origins(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Every subject with what its latest record was made of."""
        for subject, facts in self._index.execute("SELECT subject, facts FROM origins"):
            yield subject, json.loads(facts)

    def strays(self) -> list[Path]:
        """Files of a shard's name that the index does not know: from killed processes, or being written at this moment."""
        known = {shard.name for shard in self.shards()}
        return [path for path in sorted(self.folder.iterdir()) if SHARD_NAME.fullmatch(path.name) and path.name not in known]


def caches_below(folder: Path) -> list[Path]:
    """The caches in a folder: itself, or folders in it that hold an index or shards. DataError where there is none."""
    candidates = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())] if folder.is_dir() else []
    found = [path for path in candidates if _is_cache(path)]
    if not found:
        raise DataError(f"{folder} holds no cache; name the --cache_dir of a run, or a folder of latents or text embeddings.")
    return found


def _is_cache(folder: Path) -> bool:
    if (folder / INDEX).is_file():
        return True
    with contextlib.suppress(OSError):
        return any(SHARD_NAME.fullmatch(path.name) for path in folder.iterdir())
    return False
