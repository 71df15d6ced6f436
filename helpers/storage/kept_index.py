"""Indices of tars, kept on disk: headers lie all over a tar, so reading them is slow where a disk is."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from dataclasses import astuple
from pathlib import Path

from helpers.errors import StorageError
from helpers.storage.atomic import write_file
from helpers.storage.tar import Member, Members, TarIndex, Version, read_index, version_of

_FORMAT = f"tar index 1 {sys.byteorder}"
_DIGEST_BYTES = hashlib.sha256().digest_size


def kept_index(path: Path, folder: Path) -> TarIndex:
    """The index of a tar: from `folder`, where it is kept by the tar's path, or read anew and kept when the tar is another one.

    DataError and OSError as `read_index`; StorageError when it cannot be kept.
    """
    address = str(path.absolute()).encode("utf-8", "surrogateescape")
    place = folder / f"{hashlib.sha256(address).hexdigest()[:32]}.index"
    found = _load(place)
    if found is not None and found.version == version_of(path):
        return found
    index = read_index(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} could not be made: {error.strerror}") from error
    write_file(place, _packed(index))
    return index


def _packed(index: TarIndex) -> bytes:
    """A line of JSON, the parts of the members, and a checksum of all that."""
    parts = index.members.parts
    head = {
        "format": _FORMAT,
        "version": astuple(index.version),
        "problems": [astuple(member) for member in index.problems],
        "damage": index.damage,
        "lengths": [len(part) for part in parts],
    }
    data = json.dumps(head).encode() + b"\n" + b"".join(parts)
    return data + hashlib.sha256(data).digest()


def _load(place: Path) -> TarIndex | None:
    """None where there is none that is whole and of this format: it is only a copy of what the tar says."""
    try:
        packed = place.read_bytes()
    except FileNotFoundError:
        return None
    data = packed[:-_DIGEST_BYTES]
    if hashlib.sha256(data).digest() != packed[-_DIGEST_BYTES:]:
        return None
    line, _, rest = data.partition(b"\n")
    head = json.loads(line)
    if head["format"] != _FORMAT:
        return None
    parts = []
    for length in head["lengths"]:
        parts.append(rest[:length])
        rest = rest[length:]
    names, *numbers = parts
    members = Members(names, *(array("Q", part) for part in numbers))
    return TarIndex(Version(*head["version"]), members, tuple(Member(*facts) for facts in head["problems"]), head["damage"])
