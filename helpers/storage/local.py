"""Folders on this machine, or mounted on it."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from helpers.errors import DataError
from helpers.storage.backend import Entry

# Folders that systems and tools keep beside people's files: thumbnails, bins and versions of what is already there.
SYSTEM_FOLDERS = frozenset(
    {
        ".Spotlight-V100",
        ".Trashes",
        ".fseventsd",
        ".TemporaryItems",
        ".DocumentRevisions-V100",
        ".zfs",
        ".snapshot",
        ".ipynb_checkpoints",
        ".git",
        ".thumbnails",
        "__MACOSX",
        "@eaDir",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
    }
)

# What passes by itself: too many open files, a network mount that blinks. Anything else is told at once.
_TRANSIENT = frozenset({errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.EAGAIN})
_RETRY_AFTER_SECONDS = (0.05, 0.25, 1.0)

_Result = TypeVar("_Result")


class LocalSource:
    """The files below a folder, read-only. Symbolic links are followed, also out of the root, but no folder is walked twice.

    Keys are paths relative to the root; bytes of a name that are not UTF-8 appear as surrogates, as Python's `os` gives them.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    @property
    def name(self) -> str:
        return str(self.root)

    def list(self) -> Iterator[Entry]:
        """Every regular file: real folders first, sorted by name, then linked folders in the order in which they were met.

        That order makes the real path of a file win over a link to its folder, and lets a loop of links end.
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
        """The file of a key. Keys that would leave the root by name are refused, whoever made them."""
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\0" in key:
            raise DataError(f"{key!r} is not the name of a file inside {self.root}.")
        return self.root.joinpath(*parts)


def _walk(root: Path, prefix: str, walked: set[tuple[int, int]], linked: list[str]) -> Iterator[Entry]:
    """Files below one folder of `root`. Folders seen are added to `walked` (device and inode), links to folders to `linked`."""
    folders = [prefix]
    while folders:
        folder = folders.pop()
        below: list[str] = []
        for entry in _entries(root, folder, walked):
            key = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                if entry.name not in SYSTEM_FOLDERS:
                    (linked if entry.is_symlink() else below).append(key)
            elif (listed := _listed(root, key, entry)) is not None:
                yield listed
        folders.extend(reversed(below))


def _entries(root: Path, folder: str, walked: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """What one folder holds, sorted by name; nothing when it was walked before under another name."""
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
    return DataError(f"{path} cannot be listed: {error.strerror}. Every folder below {root} must be one that you may read and enter.")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into itself (ELOOP) leads nowhere: not a folder, and named when it is opened
        return False


def _listed(root: Path, key: str, entry: os.DirEntry[str]) -> Entry | None:
    """A regular file as an `Entry`; None for pipes, sockets and devices, which must not be opened, and for what has just been removed.

    A link that leads nowhere is listed by its own times, so that whoever opens it can say that it is broken.
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
    return Entry(key, found.st_size, found.st_mtime_ns)


def patiently(attempt: Callable[[], _Result]) -> _Result:
    """Try again after errors that pass by themselves."""
    for seconds in _RETRY_AFTER_SECONDS:
        try:
            return attempt()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            time.sleep(seconds)
    return attempt()
