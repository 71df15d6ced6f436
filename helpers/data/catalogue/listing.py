"""The listing of a source and its digest. If the digest is the same as last time, no file has changed and no row needs to be compared."""

from __future__ import annotations

import hashlib
import itertools
import posixpath
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from helpers.data.base.images import EXTENSIONS
from helpers.storage.backend import Entry, SourceBackend

_BLOCK = 4096  # entries written, and read back, at a time
_IN_MEMORY = 64 * 2**20  # bytes; a longer listing is kept in a file

Row = tuple[str, str, str, int, int, str, str | None]  # key, kind, stem, size, modified_ns, etag, problem


class Listing:
    """All entries of a source, in its order. A long listing is kept in a temporary file beside the catalogue."""

    def __init__(self, backend: SourceBackend, folder: Path, captions: Collection[str]) -> None:
        """List the source. `captions` are the endings of caption files, in lower case. Errors of the source are passed on."""
        self._captions = captions
        self._kept: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder))  # noqa: SIM115  # closed by __exit__
        self._lengths: list[int] = []  # of the blocks, in bytes
        self.folders: list[str] = []  # system folders that were not entered
        hashed = hashlib.blake2b(digest_size=16)
        for entries in _blocks(backend.list()):
            self.folders += [_storable(e.key) for e in entries if e.is_folder]
            # A name cannot contain a zero byte, so it can separate the fields.
            text = "".join(f"{e.key}\0{e.size}\0{e.modified_ns}\0{e.etag}\0{e.problem}\0" for e in entries if not e.is_folder)
            block = text.encode("utf-8", "surrogateescape")
            hashed.update(block)
            self._kept.write(block)
            self._lengths.append(len(block))
        hashed.update("\0".join(["", *self.folders, "", *captions]).encode())
        self.digest = hashed.hexdigest()

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kept.close()

    def rows(self) -> Iterator[Row]:
        """Each entry as a row of the catalogue."""
        self._kept.seek(0)
        for length in self._lengths:
            fields = iter(self._kept.read(length).decode("utf-8", "surrogateescape").split("\0")[:-1])
            for key, size, modified_ns, etag, problem in zip(fields, fields, fields, fields, fields, strict=True):
                yield _row(key, int(size), int(modified_ns), etag, problem, self._captions)


def _blocks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    while block := list(itertools.islice(entries, _BLOCK)):
        yield block


def _row(key: str, size: int, modified_ns: int, etag: str, found: str, captions: Collection[str]) -> Row:
    """`kind` is given by the extension. `problem` is what the source `found`, or that the file is neither image nor caption."""
    stem, ending = posixpath.splitext(key)
    kind, problem = "other", None
    shown = _storable(key)
    if shown != key:
        return shown, kind, shown, size, modified_ns, etag, "file name is not UTF-8: rename the file"
    if found:
        problem = found
    elif ending.lower() in EXTENSIONS:
        kind = "image"
    elif ending.lower() in captions:
        kind = "caption"
    else:
        problem = f"not an image: its name ends in {ending}" if ending else "not an image: its name has no ending"
    return key, kind, stem, size, modified_ns, etag, problem


def _storable(name: str) -> str:
    r"""A name with its bytes that are not UTF-8 as \xNN: neither SQLite nor JSON can hold them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
