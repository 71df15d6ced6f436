"""Protocols for storage: a source can only be read, a data backend can also be written.

Training images are only reached through a `SourceBackend`, which has no method to write or delete. This one holds everything in memory:

    class Memory:
        name = "memory"

        def __init__(self, files: dict[str, bytes]) -> None:
            self.files = files

        def list(self):
            return (Entry(key, len(data), 0) for key, data in sorted(self.files.items()))

        def open(self, key):
            return io.BytesIO(self.files[key])

        def read(self, key):
            return self.files[key]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or object, as a listing shows it without opening it."""

    key: str  # path relative to the root, with "/"
    size: int  # bytes
    modified_ns: int  # nanoseconds since 1970 by the store's clock; only compared for equality
    etag: str = ""  # what else changes with the content: the store's version mark, or change time and inode
    problem: str = ""  # the reason why it cannot be used, as "kind: detail", if the listing already shows one
    is_folder: bool = False  # a system folder that was not entered, for the report; never a folder of files


def skipped_folder(key: str) -> Entry:
    """The entry of a system folder that was not entered."""
    return Entry(f"{key}/", 0, 0, is_folder=True)


class SourceBackend(Protocol):
    """Files that are only read. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """The folder or address, for messages."""
        ...

    def list(self) -> Iterator[Entry]:
        """Every file once, and every system folder that is not entered, in an order that depends only on the names.

        DataError if the place does not exist.
        """
        ...

    def open(self, key: str) -> BinaryIO:
        """A stream at the first byte, for reading headers. The caller closes it. OSError if the file cannot be opened."""
        ...

    def read(self, key: str) -> bytes:
        """The whole file. OSError if it cannot be read."""
        ...


@runtime_checkable
class RemoteSource(SourceBackend, Protocol):
    """A source behind a network. It is fast only with many reads at the same time."""

    reads_at_once: int


class DataBackend(SourceBackend, Protocol):
    """Files that we write: caches, never training images. There is no method to delete."""

    def write(self, key: str, data: bytes) -> None:
        """Write the whole file, or leave the old one unchanged. StorageError if that fails."""
        ...

    def read_part(self, key: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, which must all exist. OSError if they cannot be read."""
        ...
