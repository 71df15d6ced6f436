"""Reading ahead from slow sources: many threads, bounded memory, results in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, TypeVar

from helpers.storage.backend import Entry, RemoteSource, SourceBackend

BYTES_AHEAD = 256 * 2**20  # of files read ahead and not yet used
_FIRST_GUESS = 4 * 2**20  # assumed bytes of a file, before the first one has been read

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_in_threads(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """`map(make, items)`, with up to `threads` items computed at the same time.

    An error is raised when its item is due. Closing the iterator, as leaving a `for` loop does, starts no further item and waits for those
    that are being computed.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    pending: deque[Future[Made]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) >= threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def read_ahead(source: SourceBackend, keys: Iterable[str]) -> Iterator[SourceBackend]:
    """Yield the source. If it is remote, `keys` are read in this order before they are asked for; each may be asked for once."""
    if not isinstance(source, RemoteSource):
        yield source
        return
    ahead = _ReadAhead(source, keys)
    try:
        yield ahead
    finally:
        ahead.close()


class _ReadAhead:
    """A `SourceBackend` that reads ahead. To bound memory, a file being read is assumed to be as large as the largest one so far."""

    def __init__(self, source: RemoteSource, keys: Iterable[str]) -> None:
        self.source = source
        self._keys = iter(keys)
        self._pool = ThreadPoolExecutor(source.reads_at_once, thread_name_prefix="read")
        self._changed = threading.Condition()
        self._read: dict[str, Future[bytes]] = {}  # started, and not yet asked for
        self._next: str | None = None
        self._largest = _FIRST_GUESS
        self._ready = 0  # bytes in memory
        self._coming = 0  # files being read
        with self._changed:
            self._next = next(self._keys, None)
            self._start()

    @property
    def name(self) -> str:
        return self.source.name

    def list(self) -> Iterator[Entry]:
        return self.source.list()

    def open(self, key: str) -> BinaryIO:
        return self.source.open(key)

    def read(self, key: str) -> bytes:
        """The whole file. It must be one of `keys`."""
        with self._changed:
            # Reads start in order, and at least one is always running, so the next key never waits for another one to be taken.
            self._changed.wait_for(lambda: key in self._read or self._next is None)
            future = self._read.pop(key)
        try:
            data = future.result()
        finally:
            with self._changed:
                if future.exception() is None:
                    self._ready -= len(future.result())
                self._start()
        return data

    def close(self) -> None:
        with self._changed:
            self._next = None
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)

    def _start(self) -> None:
        """Start as many reads as fit into memory, at least one. The caller holds the lock."""
        while self._next is not None and (not self._read or self._ready + (self._coming + 1) * self._largest <= BYTES_AHEAD):
            if self._coming >= 2 * self.source.reads_at_once:
                break
            self._coming += 1
            self._read[self._next] = future = self._pool.submit(self.source.read, self._next)
            self._next = next(self._keys, None)
            future.add_done_callback(self._arrived)  # called at once, and so from here, if it is already read
        self._changed.notify_all()

    def _arrived(self, future: Future[bytes]) -> None:
        with self._changed:
            self._coming -= 1
            if not future.cancelled() and future.exception() is None:
                size = len(future.result())
                self._largest = max(self._largest, size)
                self._ready += size
            self._start()
