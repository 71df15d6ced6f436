"""An uncompressed tar: an index of its members from the headers, and reading a member by its offset."""

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
from helpers.storage.local import patiently
from helpers.storage.system_folders import system_folder_of

_BLOCK = 512  # bytes; headers and contents start at multiples of it
_END = bytes(_BLOCK)  # the first block after the last member

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a tar."""

    name: str  # with "/", without a leading "./"
    offset: int  # of its first byte, in bytes from the start of the tar
    size: int  # bytes
    problem: str = ""  # the reason why it cannot be used, as "kind: detail"


@dataclass(frozen=True, slots=True)
class Version:
    """Size and time of a tar: a tar with others was replaced."""

    size: int  # bytes
    modified_ns: int


class Members:
    """The usable members of a tar by name, in a few arrays: 24 bytes each plus the name. Python objects would take hundreds."""

    def __init__(self, names: bytes, ends: array[int], offsets: array[int], sizes: array[int]) -> None:
        self._names = names  # all names, joined, sorted by their bytes
        self._ends = ends  # the end of each name in `names`
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
        """The arrays as bytes, in the machine's byte order."""
        return self._names, self._ends.tobytes(), self._offsets.tobytes(), self._sizes.tobytes()

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Member]:
        """Sorted by the bytes of the names."""
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
    """The content of a tar, from its headers."""

    version: Version
    members: Members
    problems: tuple[Member, ...]  # members that cannot be used, in the order of the tar
    damage: str = ""  # the reason why the tar was not read to its end, as "kind: detail"
    skipped_folders: tuple[str, ...] = ()  # system folders, sorted
    etag: str = ""  # change time and inode of the tar

    def to_bytes(self) -> bytes:
        """One line of JSON and the members' arrays, for a memo on this machine."""
        parts = self.members.parts
        head = {
            "version": astuple(self.version),
            "problems": [astuple(member) for member in self.problems],
            "damage": self.damage,
            "skipped_folders": self.skipped_folders,
            "etag": self.etag,
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
        problems = tuple(Member(*facts) for facts in head["problems"])
        return cls(Version(*head["version"]), members, problems, head["damage"], tuple(head["skipped_folders"]), head["etag"])


def read_index(path: Path) -> TarIndex:
    """Read the headers of a tar, up to the end or the first damage.

    DataError if it is compressed or not a tar, OSError if it cannot be opened.
    """
    good: list[Member] = []
    problems: list[Member] = []
    names: set[str] = set()
    skipped: set[str] = set()
    damage = ""
    with patiently(lambda: path.open("rb")) as stream:
        state = os.fstat(stream.fileno())
        version = _version(state)
        _refuse_other_formats(path, stream.read(_BLOCK))
        stream.seek(0)
        try:
            for found in _headers(stream):
                system = system_folder_of(posixpath.normpath(found.name))
                if system is not None:
                    skipped.add(system)
                    continue
                member = _member(found, version.size, names)
                if member is not None:
                    names.add(member.name)
                    (problems if member.problem else good).append(member)
        except _Damaged as error:
            damage = str(error)
    etag = f"{state.st_ctime_ns}-{state.st_ino}"
    return TarIndex(version, Members.from_members(good), tuple(problems), damage, tuple(sorted(skipped)), etag)


def read_member(path: Path, version: Version, offset: int, size: int) -> bytes:
    """`size` bytes of a tar from `offset`. OSError if it cannot be read, or has changed since `version`."""

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
                raise OSError(f"{path} ends at byte {at}, in the middle of the member")
            return b"".join(parts)
        finally:
            os.close(descriptor)

    return patiently(attempt)


class Section(io.RawIOBase):
    """A member as a stream, to read only its header."""

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

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the base class declares a type that cannot be named
        wanted = min(len(buffer), max(0, self._member.size - self._at))
        data = read_member(self._path, self._version, self._member.offset + self._at, wanted)
        buffer[:wanted] = data
        self._at += wanted
        return wanted


class _Damaged(Exception):
    """The tar cannot be read any further. The message is the reason as "kind: detail"."""


def _headers(stream: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar. Raises _Damaged where they end early, which the library mistakes for the end of the tar."""
    if not stream.peek(1):
        raise _Damaged("damaged tar: the file is empty")
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (found := tar.next()) is not None:
                yield found
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header in memory
            stream.seek(tar.offset)
            after = stream.read(_BLOCK)
    except (tarfile.TarError, ValueError) as error:
        raise _Damaged(f"damaged tar: {error}; the members before that are used") from None
    if not after:
        raise _Damaged("damaged tar: it is cut off, or was not finished; the members so far are used")
    if after != _END:
        raise _Damaged(f"damaged tar: no header at byte {tar.offset}; the members before that are used")


def _member(found: tarfile.TarInfo, tar_size: int, names: set[str]) -> Member | None:
    """The member of a header, with the reason if it cannot be used. None for folders."""
    name = posixpath.normpath(found.name)
    parts = name.split("/")
    if found.isdir():
        return None
    problem = ""
    if found.name.startswith("/") or ".." in parts:
        name, problem = found.name, "unsafe name: it points outside the tar"
    elif found.issym() or found.islnk():
        problem = f"a link: to {found.linkname}; links in a tar are not followed"
    elif not found.isreg() or found.issparse():
        problem = "not a plain file: a device, a pipe, or a sparse file"
    elif found.offset_data + found.size > tar_size:
        problem = "cut off: the tar ends in the middle of it"
    if name in names:
        # Keys must be unique; this one is only used in the report.
        name, problem = (
            f"{name} (again at byte {found.offset})",
            problem or "duplicate name: an earlier member of the tar has the same name",
        )
    return Member(name, found.offset_data, found.size, problem)


def _refuse_other_formats(path: Path, beginning: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if beginning.startswith(magic):
            raise DataError(f"{path} is compressed with {name}; decompress it to a plain .tar, which allows reading single images.")
    if len(beginning) == _BLOCK and beginning != _END:
        try:
            tarfile.TarInfo.frombuf(beginning, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise DataError(f"{path} is not a tar; urls must name tars.") from None


def _version(found: os.stat_result) -> Version:
    return Version(found.st_size, found.st_mtime_ns)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
