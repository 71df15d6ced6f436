"""What a store of named bytes can do: a source is read, a data store is also written.

Training images are only ever reached through a `SourceBackend`, which has no way to write or delete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object, as a listing tells it without opening it."""

    key: str  # relative to the store's root, with "/"
    size: int  # bytes
    modified_ns: int  # nanoseconds since 1970 by the store's clock; compared for equality only
    etag: str = ""  # the store's own version mark, where it has one
    problem: str = ""  # why it cannot be used, as "kind: detail", where the listing shows that already


class SourceBackend(Protocol):
    """Bytes that are only read. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """Where this is, in words for messages: a folder or an address."""
        ...

    def list(self) -> Iterator[Entry]:
        """Every object once, in an order that depends on the names alone. DataError when there is no such place."""
        ...

    def open(self, key: str) -> BinaryIO:
        """A stream at the object's first byte, for reading headers; the caller closes it. OSError when it cannot be opened."""
        ...

    def read(self, key: str) -> bytes:
        """The whole object. OSError when it cannot be read."""
        ...


@runtime_checkable
class RemoteSource(SourceBackend, Protocol):
    """A source whose every answer travels: many reads at once are needed to keep it busy."""

    reads_at_once: int


class DataBackend(SourceBackend, Protocol):
    """Bytes that are ours: caches, never training images. Nothing is ever deleted there."""

    def write(self, key: str, data: bytes) -> None:
        """Put the whole object there or leave what was there before. StorageError when it cannot be done."""
        ...

    def read_part(self, key: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, all inside the object. OSError when they cannot be read."""
        ...
