"""A store in memory, which the tests of everything above storage run on."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from helpers.storage.backend import Entry


class MemoryBackend:
    """A `DataBackend` without a disk. Its clock ticks once for each write."""

    name = "memory"

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self._files: dict[str, tuple[bytes, int]] = {}
        self._clock = 0
        for key, data in (files or {}).items():
            self.write(key, data)

    def list(self) -> Iterator[Entry]:
        for key in sorted(self._files):
            data, modified = self._files[key]
            yield Entry(key, len(data), modified)

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.read(key))

    def read(self, key: str) -> bytes:
        if key not in self._files:
            raise FileNotFoundError(f"no object {key!r} in memory")
        return self._files[key][0]

    def write(self, key: str, data: bytes) -> None:
        self._clock += 1
        self._files[key] = (bytes(data), self._clock)

    def delete(self, key: str) -> None:
        """As somebody else might."""
        del self._files[key]

    def read_part(self, key: str, offset: int, size: int) -> bytes:
        part = self.read(key)[offset : offset + size]
        if len(part) != size:
            raise OSError(errno.EIO, f"{key} ends before byte {offset + size:,}")
        return part
