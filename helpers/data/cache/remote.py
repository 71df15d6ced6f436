"""The shards of a cache in a remote store. The cache's folder holds copies of some: a local tier, within a limit.

What is in the store is what counts. A shard that was sealed here is uploaded before the index knows of it, so a record that can be
found can be read from any machine. Copies are fetched in the background, of shards that are read, while there is room; what is not
here is read from the store record by record. Room for new shards is made by dropping the copies that were not used the longest.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from helpers.data.cache.shards import SUFFIX, UNSEALED, DamagedShardError, Placed, locked, parse_header
from helpers.errors import StorageError
from helpers.storage.backend import DataBackend

HEADERS_AT_ONCE = 16
FETCHES_AT_ONCE = 2  # each holds a whole shard in memory
_ROOM_LOCK = "room.lock"

log = logging.getLogger(__name__)


class RemoteShards:
    """`folder` is the cache's, `limit` the most bytes that shards may take there; None is no limit. Safe to use from several threads."""

    def __init__(self, store: DataBackend, folder: Path, limit: int | None = None) -> None:
        self.store = store
        self.folder = folder
        self.limit = limit
        self._pool = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="shards")
        self._wanted: set[str] = set()  # being fetched, or not to be: no room, or it failed
        self._lock = threading.Lock()

    def listed(self) -> dict[str, int]:
        """Every shard in the store, in the order in which they were written, with its size in bytes. StorageError, DataError."""
        found = {entry.key: entry.size for entry in self.store.list() if entry.key.endswith(SUFFIX) and "/" not in entry.key}
        return dict(sorted(found.items()))

    def headers(self, shards: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int, list[Placed] | DamagedShardError]]:
        """Name, size and records of shards in the store, in their order; in place of the records why it is no shard. StorageError."""
        with ThreadPoolExecutor(HEADERS_AT_ONCE, thread_name_prefix="headers") as pool:
            yield from pool.map(lambda shard: (*shard, self._header(*shard)), shards)

    def upload(self, path: Path) -> None:
        """Put a sealed shard of the folder into the store. StorageError when it cannot be done."""
        self.store.write(path.name, path.read_bytes())

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """A part of a shard, from the store; None when the shard is gone from there. StorageError when it cannot be read."""
        try:
            return self.store.read_part(name, offset, size)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{self.store.name}: {name} could not be read: {error.strerror or error}.") from error

    # -- the local tier ---------------------------------------------------------------------------------------------------

    def want(self, name: str, size: int) -> None:
        """Have a copy of a shard fetched into the folder, some time, if there is room. Returns at once."""
        with self._lock:
            if name in self._wanted:
                return
            self._wanted.add(name)
        self._pool.submit(self._fetch, name, size)

    def make_room(self, size: int, may_go: Callable[[str], bool]) -> list[str]:
        """Drop copies, the longest unused first, until `size` more bytes fit => their names. `may_go`: what is safely in the store."""
        dropped: list[str] = []
        if self.limit is None:
            return dropped
        with self._counting_room():
            files = self._files()
            surplus = sum(found.st_size for found in files.values()) + size - self.limit
            for name, found in sorted(files.items(), key=lambda file: file[1].st_mtime_ns):
                if surplus <= 0:
                    break
                if name.endswith(SUFFIX) and may_go(name):
                    surplus -= found.st_size
                    self.drop(name)
                    dropped.append(name)
        return dropped

    def touch(self, name: str) -> None:
        """Note that a copy is used. The modification time tells it: times of access are often not kept."""
        with contextlib.suppress(OSError):
            now = time.time_ns()
            os.utime(self.folder / name, ns=(now, now))

    def drop(self, name: str) -> None:
        """Give up a copy, such as a damaged one."""
        (self.folder / name).unlink(missing_ok=True)
        self._wanted.discard(name)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _header(self, name: str, size: int) -> list[Placed] | DamagedShardError:
        try:
            with self.store.open(name) as stream:
                return parse_header(stream, size)
        except DamagedShardError as error:
            return error
        except OSError as error:
            raise StorageError(f"{self.store.name}: {name} could not be read: {error.strerror or error}.") from error

    def _fetch(self, name: str, size: int) -> None:
        """A copy is a help and not needed: where it cannot be had, its records are read from the store, and that tells of what is wrong."""
        aside = self.folder / f"{name}{UNSEALED}"
        try:
            with self._counting_room():
                taken = sum(found.st_size for found in self._files().values())
                if (self.folder / name).exists() or (self.limit is not None and taken + size > self.limit):
                    return
                file = locked(aside)  # tells other processes that somebody is at it
                os.ftruncate(file.fileno(), size)  # counts as taken from now on
        except FileExistsError:
            return
        except OSError as error:
            log.warning("%s: no copy of %s is kept: %s", self.folder, name, error)
            return
        try:
            with file:
                data = self.store.read(name)
                if len(data) != size:
                    raise OSError(f"it is {len(data):,} bytes long instead of {size:,}")
                file.write(data)
                file.flush()
                os.replace(aside, self.folder / name)
        except OSError as error:
            log.warning("%s: no copy of %s is kept: %s", self.folder, name, error.strerror or error)
        finally:
            aside.unlink(missing_ok=True)

    def _files(self) -> dict[str, os.stat_result]:
        """Shards in the folder, finished or not, by name."""
        found = {}
        for name in os.listdir(self.folder):
            if name.endswith((SUFFIX, SUFFIX + UNSEALED)):
                with contextlib.suppress(FileNotFoundError):  # it was being written, and now has another name
                    found[name] = (self.folder / name).stat()
        return found

    @contextmanager
    def _counting_room(self) -> Iterator[None]:
        """One process and thread at a time, so that two do not both take the last room."""
        with self._lock, (self.folder / _ROOM_LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
