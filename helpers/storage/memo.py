"""Results that take long to compute, kept in a folder so that a later start reads them instead.

Every result is stored with a digest of everything it was computed from, and is returned only for the same digest. Deleting the folder
costs time and nothing else.

    memo = Memo(cache_dir / "memo")
    sha256 = memo.recall("weights unet.safetensors", digest_of(file_state(path)), lambda: hash_file(path))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from helpers.errors import StorageError
from helpers.storage.atomic import write_file

_FORMAT = "simpletuner memo 1"
Result = TypeVar("Result")


def digest_of(*inputs: object) -> str:
    """32 hex digits that change with any of the inputs. They are compared as JSON; what JSON cannot hold, by its text."""
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def file_state(path: Path) -> tuple[int, int, int, int]:
    """Size in bytes, modification time and change time in nanoseconds, and inode. While all four stay, the content is taken to stay.

    Archivers restore modification times, so two versions of a file may differ in nothing but inode and change time. OSError.
    """
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


class Memo:
    """Results by name, one file each. Several processes and threads may read and write one folder: a file is replaced as a whole.

    A file is one line of JSON (format, name, digest of the inputs, checksum of the rest) and then the result's bytes. A file that is
    missing, damaged, or stored for other inputs gives None. Only writing raises: StorageError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recall(self, name: str, inputs: str, make: Callable[[], Result]) -> Result:
        """The stored JSON value, or else what `make()` returns, which is then stored."""
        value = self.load_value(name, inputs)
        if value is None:
            value = make()
            self.save_value(name, inputs, value)
        return value

    def load_value(self, name: str, inputs: str) -> Any | None:
        """A result stored by `save_value`."""
        payload = self.load_bytes(name, inputs)
        return None if payload is None else json.loads(payload)

    def save_value(self, name: str, inputs: str, value: Any) -> None:
        """Store what JSON can hold, but not None."""
        self.save_bytes(name, inputs, json.dumps(value).encode())

    def load_bytes(self, name: str, inputs: str) -> bytes | None:
        """A result stored by `save_bytes`."""
        try:
            line, _, payload = self._path(name).read_bytes().partition(b"\n")
        except OSError:
            return None
        return payload if line == _header(name, inputs, payload) else None

    def save_bytes(self, name: str, inputs: str, payload: bytes) -> None:
        """Store a result in place of an earlier one of this name."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.folder} could not be made: {error.strerror or error}") from error
        write_file(self._path(name), _header(name, inputs, payload) + b"\n" + payload)

    def forget(self, name: str) -> None:
        """Drop a result, for a caller that is about to replace files the result vouches for."""
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self._path(name)} could not be removed: {error.strerror or error}") from error

    def _path(self, name: str) -> Path:
        """Names may hold paths and ids of any length, so the file is called by a hash; its first line holds the name."""
        return self.folder / f"{digest_of(name)}.memo"


def _header(name: str, inputs: str, payload: bytes) -> bytes:
    checksum = hashlib.blake2b(payload, digest_size=16).hexdigest()
    return json.dumps({"format": _FORMAT, "name": name, "inputs": inputs, "blake2b": checksum}).encode()
