"""The shards of a cache in a remote store, with local copies of some of them up to a size limit.

A sealed shard is uploaded before the index gets to know it. So every record in the index can be read from any machine. When a record is
read, a copy of its shard is downloaded in the background if there is space; until then, records are read from the store one by one.
The least recently used copies are deleted when new shards need the space.
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

from helpers.data.cache.shards import SUFFIX, UNSEALED, DamagedShardError, RecordEntry, locked, parse_header
from helpers.errors import StorageError
from helpers.storage.backend import DataBackend

HEADERS_AT_ONCE = 16
FETCHES_AT_ONCE = 2  # each holds a whole shard in memory
_ROOM_LOCK = "room.lock"

log = logging.getLogger(__name__)


class RemoteShards:
    """`folder` is the cache's folder. `limit` is the most bytes that shards may take there, None for no limit. Safe to use from threads."""

    def __init__(self, store: DataBackend, folder: Path, limit: int | None = None) -> None:
        self.store = store
        self.folder = folder
        self.limit = limit
        self._pool = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="shards")
        self._requested: set[str] = set()  # downloads that were started; one that failed or found no space is not tried again
        self._lock = threading.Lock()

    def listed(self) -> dict[str, int]:
        """Name => bytes of every shard in the store, in the order in which they were written. StorageError, DataError."""
        found = {entry.key: entry.size for entry in self.store.list() if entry.key.endswith(SUFFIX) and "/" not in entry.key}
        return dict(sorted(found.items()))

    def headers(self, shards: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int, list[RecordEntry] | DamagedShardError]]:
        """For shards in the store: name, size and records, or in place of the records the reason why it is not a shard. StorageError."""
        with ThreadPoolExecutor(HEADERS_AT_ONCE, thread_name_prefix="headers") as pool:
            yield from pool.map(lambda shard: (*shard, self._header(*shard)), shards)

    def upload(self, path: Path) -> None:
        """Copy a sealed shard from the folder to the store. StorageError if that fails."""
        self.store.write(path.name, path.read_bytes())

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """`size` bytes of a shard in the store. None if the shard is gone, StorageError if it cannot be read."""
        try:
            return self.store.read_part(name, offset, size)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{self.store.name}: {name} could not be read: {error.strerror or error}.") from error

    # -- local copies ----------------------------------------------------------------------------------------------------

    def download_later(self, name: str, size: int) -> None:
        """Start to download a copy of a shard in the background, if there is space. Returns at once."""
        with self._lock:
            if name in self._requested:
                return
            self._requested.add(name)
        self._pool.submit(self._download, name, size)

    def make_room(self, size: int, is_stored: Callable[[str], bool]) -> list[str]:
        """Delete copies, the least recently used first, until `size` more bytes fit. Returns their names.

        Only shards for which `is_stored(name)` is true are deleted.
        """
        deleted: list[str] = []
        if self.limit is None:
            return deleted
        with self._space_lock():
            files = self._files()
            surplus = sum(found.st_size for found in files.values()) + size - self.limit
            for name, found in sorted(files.items(), key=lambda file: file[1].st_mtime_ns):
                if surplus <= 0:
                    break
                if name.endswith(SUFFIX) and is_stored(name):
                    surplus -= found.st_size
                    self.delete_copy(name)
                    deleted.append(name)
        return deleted

    def mark_used(self, name: str) -> None:
        """Record that a copy was used, in its modification time: many file systems do not keep access times."""
        with contextlib.suppress(OSError):
            now = time.time_ns()
            os.utime(self.folder / name, ns=(now, now))

    def delete_copy(self, name: str) -> None:
        """Delete a copy, such as a damaged one; it may be downloaded again."""
        (self.folder / name).unlink(missing_ok=True)
        self._requested.discard(name)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _header(self, name: str, size: int) -> list[RecordEntry] | DamagedShardError:
        try:
            with self.store.open(name) as stream:
                return parse_header(stream, size)
        except DamagedShardError as error:
            return error
        except OSError as error:
            raise StorageError(f"{self.store.name}: {name} could not be read: {error.strerror or error}.") from error

    def _download(self, name: str, size: int) -> None:
        """Download a copy. A failure is only logged: the records are read from the store instead, which reports its own errors."""
        aside = self.folder / f"{name}{UNSEALED}"
        try:
            with self._space_lock():
                taken = sum(found.st_size for found in self._files().values())
                if (self.folder / name).exists() or (self.limit is not None and taken + size > self.limit):
                    return
                file = locked(aside)  # tells other processes that a download is running
                os.ftruncate(file.fileno(), size)  # reserves the space
        except FileExistsError:
            return
        except OSError as error:
            log.warning("%s: %s was not copied here: %s", self.folder, name, error)
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
            log.warning("%s: %s was not copied here: %s", self.folder, name, error.strerror or error)
        finally:
            aside.unlink(missing_ok=True)

    def _files(self) -> dict[str, os.stat_result]:
        """All shards in the folder, complete or not, by name."""
        found = {}
        for name in os.listdir(self.folder):
            if name.endswith((SUFFIX, SUFFIX + UNSEALED)):
                with contextlib.suppress(FileNotFoundError):  # it was just completed, and renamed
                    found[name] = (self.folder / name).stat()
        return found

    @contextmanager
    def _space_lock(self) -> Iterator[None]:
        """For one thread of one process at a time, so that two do not both take the last free space."""
        with self._lock, (self.folder / _ROOM_LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
