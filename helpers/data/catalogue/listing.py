"""A source's listing, taken once: its digest tells whether anything has changed, and only then are its rows looked at one by one."""

from __future__ import annotations

import hashlib
import itertools
import posixpath
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from helpers.data.base.images import EXTENSIONS
from helpers.data.catalogue.captions import CAPTION_EXTENSION
from helpers.storage.backend import Entry, SourceBackend

_BLOCK = 4096  # entries put away, and read back, at a time
_IN_MEMORY = 64 * 2**20  # bytes; a longer listing goes to a file

Row = tuple[str, str, str, int, int, str, str | None]  # key, kind, stem, size, modified_ns, etag, problem


class Listing:
    """All entries of a source in the order in which it lists them, kept in a file beside the catalogue while they are compared."""

    def __init__(self, backend: SourceBackend, folder: Path) -> None:
        """Lists the source; what the source raises comes through."""
        self._kept: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder))  # noqa: SIM115  # closed by __exit__
        self._lengths: list[int] = []  # of the blocks, in bytes
        hashed = hashlib.blake2b(digest_size=16)
        for entries in _blocks(backend.list()):
            # No name holds a zero byte.
            text = "".join(f"{e.key}\0{e.size}\0{e.modified_ns}\0{e.etag}\0{e.problem}\0" for e in entries)
            block = text.encode("utf-8", "surrogateescape")
            hashed.update(block)
            self._kept.write(block)
            self._lengths.append(len(block))
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
                yield _row(key, int(size), int(modified_ns), etag, problem)


def _blocks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    while block := list(itertools.islice(entries, _BLOCK)):
        yield block


def _row(key: str, size: int, modified_ns: int, etag: str, found: str) -> Row:
    """`kind` by the ending of its name; `problem` is what the source `found`, or that it is neither image nor caption."""
    stem, ending = posixpath.splitext(key)
    kind, problem = "other", None
    try:
        key.encode()
    except UnicodeEncodeError:  # shown with its stray bytes as \xNN; such a name can be stored and reported nowhere else
        shown = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return shown, kind, shown, size, modified_ns, etag, "file name is not UTF-8: rename the file"
    if found:
        problem = found
    elif ending.lower() in EXTENSIONS:
        kind = "image"
    elif ending.lower() == CAPTION_EXTENSION:
        kind = "caption"
    else:
        problem = f"not an image: its name ends in {ending}" if ending else "not an image: its name has no ending"
    return key, kind, stem, size, modified_ns, etag, problem
