"""One uncompressed tar as an index of its members, made from the headers alone; the bytes of a member are read by their place."""

from __future__ import annotations

import io
import itertools
import json
import os
import posixpath
import tarfile
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from helpers.errors import DataError
from helpers.storage.local import SYSTEM_FOLDERS, patiently

_BLOCK = 512  # bytes: headers and contents begin at multiples of it
_END = bytes(_BLOCK)  # what the first block after the last member holds

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclass(frozen=True, slots=True)
class Member:
    """One object of a tar."""

    name: str  # with "/", without a leading "./"
    offset: int  # of its first byte in the tar
    size: int  # bytes
    problem: str = ""  # why it cannot be read, as "kind: detail"


@dataclass(frozen=True, slots=True)
class Version:
    """What tells a tar from the one that was there before."""

    size: int  # bytes
    modified_ns: int


class Members:
    """The readable members of a tar by name, in a few arrays: 24 bytes each beside the name, where objects take hundreds."""

    def __init__(self, names: bytes, ends: array[int], offsets: array[int], sizes: array[int]) -> None:
        self._names = names  # in the order of their bytes, one after the other
        self._ends = ends  # where each name ends
        self._offsets = offsets
        self._sizes = sizes

    @classmethod
    def from_members(cls, members: Iterable[Member]) -> Members:
        ordered = sorted(members, key=lambda member: _encoded(member.name))
        names = [_encoded(member.name) for member in ordered]
        ends = array("Q", itertools.accumulate(map(len, names)))
        return cls(b"".join(names), ends, array("Q", (m.offset for m in ordered)), array("Q", (m.size for m in ordered)))

    @property
    def parts(self) -> tuple[bytes, bytes, bytes, bytes]:
        """What it is made of, as bytes in the machine's own order."""
        return self._names, self._ends.tobytes(), self._offsets.tobytes(), self._sizes.tobytes()

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Member]:
        """In the order of their names' bytes."""
        return map(self._member, range(len(self)))

    def get(self, name: str) -> Member | None:
        place = bisect_left(range(len(self)), _encoded(name), key=self._name)
        return self._member(place) if place < len(self) and self._name(place) == _encoded(name) else None

    def _name(self, place: int) -> bytes:
        return self._names[self._ends[place - 1] if place else 0 : self._ends[place]]

    def _member(self, place: int) -> Member:
        name = self._name(place).decode("utf-8", "surrogateescape")
        return Member(name, self._offsets[place], self._sizes[place])


@dataclass(frozen=True)
class TarIndex:
    """What a tar holds, by its headers."""

    version: Version
    members: Members
    problems: tuple[Member, ...]  # those that cannot be read, in the order of the tar
    damage: str = ""  # why the tar was not read to its end, as "kind: detail"

    def to_bytes(self) -> bytes:
        """One line of JSON and the members' arrays, for a memo on this machine."""
        parts = self.members.parts
        head = {
            "version": astuple(self.version),
            "problems": [astuple(member) for member in self.problems],
            "damage": self.damage,
            "lengths": [len(part) for part in parts],
        }
        return json.dumps(head).encode() + b"\n" + b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> TarIndex:
        """What `to_bytes` gave."""
        line, _, arrays = data.partition(b"\n")
        head = json.loads(line)
        ends = list(itertools.accumulate(head["lengths"]))
        names, *numbers = (arrays[end - length : end] for end, length in zip(ends, head["lengths"], strict=True))
        members = Members(names, *(array("Q", part) for part in numbers))
        return cls(Version(*head["version"]), members, tuple(Member(*facts) for facts in head["problems"]), head["damage"])


def read_index(path: Path) -> TarIndex:
    """Read the headers of a tar. A tar that is cut off or damaged gives what comes before.

    DataError for what is no plain tar, OSError when it cannot be opened.
    """
    good: list[Member] = []
    problems: list[Member] = []
    names: set[str] = set()
    damage = ""
    with patiently(lambda: path.open("rb")) as stream:
        version = _version(os.fstat(stream.fileno()))
        _refuse_other_formats(path, stream.read(_BLOCK))
        stream.seek(0)
        try:
            for found in _headers(stream):
                member = _judged(found, version.size, names)
                if member is not None:
                    names.add(member.name)
                    (problems if member.problem else good).append(member)
        except _Damaged as error:
            damage = str(error)
    return TarIndex(version, Members.from_members(good), tuple(problems), damage)


def read_member(path: Path, version: Version, offset: int, size: int) -> bytes:
    """`size` bytes of a tar from `offset`. OSError when it cannot be read, or is not the one that was indexed."""

    def attempt() -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _version(os.fstat(descriptor)) != version:
                raise OSError(f"{path} was changed while it was in use; start again")
            parts = []
            at, end = offset, offset + size
            while at < end and (part := os.pread(descriptor, end - at, at)):
                parts.append(part)
                at += len(part)
            if at < end:
                raise OSError(f"{path} ends at byte {at}, before the member does")
            return b"".join(parts)
        finally:
            os.close(descriptor)

    return patiently(attempt)


class Section(io.RawIOBase):
    """A member as a stream, for whoever needs its beginning only."""

    def __init__(self, path: Path, version: Version, member: Member) -> None:
        self._path = path
        self._version = version
        self._member = member
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._member.size}[whence]
        if start + offset < 0:
            raise ValueError(f"{offset} from {start} is before the first byte")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the library names a type that has no name
        wanted = min(len(buffer), max(0, self._member.size - self._at))
        data = read_member(self._path, self._version, self._member.offset + self._at, wanted)
        buffer[:wanted] = data
        self._at += wanted
        return wanted


class _Damaged(Exception):
    """The headers cannot be followed any further; the message is a reason as "kind: detail"."""


def _headers(stream: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar. Raises _Damaged where it breaks off; the library itself takes most damage for the end."""
    if not stream.peek(1):
        raise _Damaged("damaged tar: the file is empty")
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (found := tar.next()) is not None:
                yield found
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember every header
            stream.seek(tar.offset)
            after = stream.read(_BLOCK)
    except (tarfile.TarError, ValueError) as error:
        raise _Damaged(f"damaged tar: {error}; what comes before is used") from None
    if not after:
        raise _Damaged("damaged tar: it is cut off, or was never finished; what is there is used")
    if after != _END:
        raise _Damaged(f"damaged tar: no header at byte {tar.offset}; what comes before is used")


def _judged(found: tarfile.TarInfo, tar_size: int, names: set[str]) -> Member | None:
    """A header as a member, with what is wrong with it; None for folders and for what systems keep beside people's files."""
    name = posixpath.normpath(found.name)
    parts = name.split("/")
    if found.isdir() or not SYSTEM_FOLDERS.isdisjoint(parts):
        return None
    problem = ""
    if found.name.startswith("/") or ".." in parts:
        name, problem = found.name, "unsafe name: it leads out of the tar"
    elif found.issym() or found.islnk():
        problem = f"a link: to {found.linkname}; links in a tar are not followed"
    elif not found.isreg() or found.issparse():
        problem = "not a plain file: a device, a pipe, or with holes"
    elif found.offset_data + found.size > tar_size:
        problem = "cut off: the tar ends in the middle of it"
    if name in names:
        # The key of what is listed must be unique; this one is for the report alone.
        name, problem = f"{name} (again at byte {found.offset})", problem or "a second one: an earlier member of the tar has this name"
    return Member(name, found.offset_data, found.size, problem)


def _refuse_other_formats(path: Path, beginning: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if beginning.startswith(magic):
            raise DataError(f"{path} is compressed with {name}; unpack it to a plain .tar, which can be read from any place.")
    if len(beginning) == _BLOCK and beginning != _END:
        try:
            tarfile.TarInfo.frombuf(beginning, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise DataError(f"{path} is not a tar; name tars in urls.") from None


def _version(found: os.stat_result) -> Version:
    return Version(found.st_size, found.st_mtime_ns)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
