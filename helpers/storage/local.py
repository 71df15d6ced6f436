"""Folders on this machine, or mounted on it, as a source."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from helpers.errors import DataError
from helpers.storage.backend import Entry, skipped_folder
from helpers.storage.system_folders import is_system_folder

# Temporary errors: too many open files, a network mount that reconnects. Any other error is raised at once.
_TRANSIENT = frozenset({errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.EAGAIN})
_RETRY_AFTER_SECONDS = (0.05, 0.25, 1.0)

_Result = TypeVar("_Result")


class LocalSource:
    """The files below a folder, read-only. Symbolic links are followed, also to places outside the root, but no folder is listed twice.

    Keys are paths relative to the root. Bytes of a name that are not UTF-8 become surrogates, as in Python's `os`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    @property
    def name(self) -> str:
        return str(self.root)

    def list(self) -> Iterator[Entry]:
        """Every regular file and every system folder: first those in real folders, sorted by name, then those in linked folders.

        So a file is listed under its real path rather than through a link, and loops of links end.
        """
        if not self.root.is_dir():
            raise DataError(f"{self.root} {'is not a folder' if self.root.exists() else 'does not exist'}.")
        walked: set[tuple[int, int]] = set()
        linked = [""]
        for prefix in linked:  # grows while it is walked
            yield from _walk(self.root, prefix, walked, linked)

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        return patiently(lambda: path.open("rb"))

    def read(self, key: str) -> bytes:
        return patiently(self._path(key).read_bytes)

    def _path(self, key: str) -> Path:
        """The file of a key. DataError for a key that names a file outside the root."""
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\0" in key:
            raise DataError(f"{key!r} is not the name of a file inside {self.root}.")
        return self.root.joinpath(*parts)


def _walk(root: Path, prefix: str, walked: set[tuple[int, int]], linked: list[str]) -> Iterator[Entry]:
    """The files below one folder of `root`. Adds the folders to `walked` (device and inode) and links to folders to `linked`."""
    folders = [prefix]
    while folders:
        folder = folders.pop()
        below: list[str] = []
        for entry in _entries(root, folder, walked):
            key = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                if is_system_folder(entry.name):
                    yield skipped_folder(key)
                else:
                    (linked if entry.is_symlink() else below).append(key)
            elif (listed := _listed(root, key, entry)) is not None:
                yield listed
        folders.extend(reversed(below))


def _entries(root: Path, folder: str, walked: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """The entries of one folder, sorted by name. Empty if the folder was listed before under another name."""
    path = root / folder
    try:
        found = path.stat()
        if (found.st_dev, found.st_ino) in walked:
            return []
        walked.add((found.st_dev, found.st_ino))
        with os.scandir(path) as scan:
            return sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise _not_listed(path, root, error) from error


def _not_listed(path: Path, root: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be listed: {error.strerror}. You need permission to read and enter every folder below {root}.")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself (ELOOP): listed as a file, and reported when it is opened
        return False


def _listed(root: Path, key: str, entry: os.DirEntry[str]) -> Entry | None:
    """A regular file as an `Entry`. None for pipes, sockets and devices, which must not be opened, and for a file just deleted.

    A broken link is listed with its own times; it is reported when it is opened.
    """
    try:
        found = entry.stat()
    except OSError:
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _not_listed((root / key).parent, root, error) from error
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
        return None
    return Entry(key, found.st_size, found.st_mtime_ns, etag=f"{found.st_ctime_ns}-{found.st_ino}")


def patiently(attempt: Callable[[], _Result]) -> _Result:
    """Retry after temporary errors."""
    for seconds in _RETRY_AFTER_SECONDS:
        try:
            return attempt()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            time.sleep(seconds)
    return attempt()
