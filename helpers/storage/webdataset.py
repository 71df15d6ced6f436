"""Tars of samples, in the convention of the webdataset library: the members of a sample have one name and different endings.

A member `dir/0001.jpg` of `shard.tar` is shown as the file `shard/dir/0001.jpg`, and its caption as `shard/dir/0001.txt`. A sample is
what has the same name up to the first dot. Of its members

- pictures are shown; beside one with a plain ending (`0001.jpg`), those with a longer one (`0001.mask.png`) are left out by name;
- the caption is `.txt`, else `.caption`, else the text under "caption" in `.json`;
- pickled ones (`.pyd`, `.pickle`, `.pkl`, ...) are left out by name and never read;
- the rest (`.cls`, `.npy`, ...) is part of the sample where that has a picture, as a caption is, and else shown as it stands.
"""

from __future__ import annotations

import io
import itertools
import json
import posixpath
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

from helpers.errors import DataError
from helpers.storage.backend import Entry
from helpers.storage.memo import Memo, digest_of, file_state
from helpers.storage.tar import Member, Section, TarIndex, read_index, read_member

PICKLED = frozenset({".pyd", ".pickle", ".pkl", ".pt", ".pth"})
CAPTION = ".txt"  # in which every caption is shown
CAPTIONS = (CAPTION, ".TXT", ".caption", ".json")  # where it may stand
JSON_FIELD = "caption"

_INDEX = "tar index 2"  # raise it when `TarIndex.to_bytes` changes
_THREADS = 8  # that read headers: on network file systems most of the time is waiting


class WebDataset:
    """The samples of tars, read-only, by the key `name-of-the-tar/name-of-the-member`.

    `pictures` are the endings of pictures, in lower case. Headers are read once, when a tar is first needed, and what they say is
    kept in the folder `indices`, if there is one: other processes and later runs read that instead.
    """

    def __init__(self, shards: Sequence[Path], pictures: Collection[str], indices: Path | None = None) -> None:
        self._shards = {shard.stem: _Shard(shard, pictures, indices) for shard in sorted(shards, key=lambda shard: shard.stem)}
        if len(self._shards) != len(shards):
            raise ValueError("two tars have one name")
        self.name = str(shards[0]) if len(shards) == 1 else f"{len(shards):,} tars from {shards[0]} on"

    def list(self) -> Iterator[Entry]:
        """Every picture, caption and stray member, tar after tar by name. DataError for a tar that is not there or none."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="tars") as pool:
            shards = iter(self._shards.items())
            # A few tars ahead: their indices are kept, the lists made of them are not.
            while ahead := list(itertools.islice(shards, _THREADS)):
                for (name, shard), _ in zip(ahead, pool.map(lambda item: item[1].index, ahead), strict=True):
                    yield from shard.entries(name)

    def open(self, key: str) -> BinaryIO:
        shard, name = self._find(key)
        member = shard.member(name)
        if member.name != name:
            return io.BytesIO(shard.read(member, key))
        return cast(BinaryIO, io.BufferedReader(Section(shard.path, shard.index.version, member)))

    def read(self, key: str) -> bytes:
        shard, name = self._find(key)
        return shard.read(shard.member(name), key)

    def _find(self, key: str) -> tuple[_Shard, str]:
        shard, _, name = key.partition("/")
        if shard not in self._shards:
            raise FileNotFoundError(f"no tar is called {shard}")
        return self._shards[shard], name


class _Shard:
    """One tar."""

    def __init__(self, path: Path, pictures: Collection[str], indices: Path | None) -> None:
        self.path = path
        self._memo = None if indices is None else Memo(indices)
        self._pictures = pictures
        self._index: TarIndex | None = None
        self._lock = threading.Lock()

    @property
    def index(self) -> TarIndex:
        with self._lock:
            if self._index is None:
                try:
                    self._index = self._recalled() if self._memo else read_index(self.path)
                except OSError as error:
                    raise DataError(f"{self.path} cannot be read: {error.strerror or error}; check the urls.") from error
            return self._index

    def _recalled(self) -> TarIndex:
        """The index from the memo, where the tar is still the same; else read anew and stored there."""
        assert self._memo is not None
        name, inputs = f"index of {self.path.absolute()}", digest_of(_INDEX, sys.byteorder, file_state(self.path))
        stored = self._memo.load_bytes(name, inputs)
        if stored is not None:
            return TarIndex.from_bytes(stored)
        index = read_index(self.path)
        self._memo.save_bytes(name, inputs, index.to_bytes())
        return index

    def entries(self, shard: str) -> Iterator[Entry]:
        index = self.index
        modified = index.version.modified_ns

        def entry(name: str, member: Member, problem: str) -> Entry:
            # The place tells a member from one that had its name in an earlier tar of the same time.
            return Entry(f"{shard}/{name}", member.size, modified, f"{index.version.size}:{member.offset}", problem)

        if index.damage:
            yield Entry(f"{shard}.tar", index.version.size, modified, problem=index.damage)
        for _, members in itertools.groupby(index.members, key=lambda member: _sample(member.name)):
            for name, member, problem in _shown(list(members), self._pictures):
                yield entry(name, member, problem)
        for member in index.problems:
            yield entry(member.name, member, member.problem)

    def member(self, name: str) -> Member:
        """The member behind a shown name: its own, or where a caption that is shown as .txt stands."""
        stem, ending = posixpath.splitext(name)
        names = _caption_names(stem) if ending == CAPTION else (name,)
        for candidate in names:
            if (member := self.index.members.get(candidate)) is not None:
                return member
        raise FileNotFoundError(f"{self.path} has no member {name}")

    def read(self, member: Member, key: str) -> bytes:
        data = read_member(self.path, self.index.version, member.offset, member.size)
        return _caption_in(data, member.name) if member.name.endswith(".json") and key.endswith(CAPTION) else data


def _shown(members: Sequence[Member], pictures: Collection[str]) -> Iterator[tuple[str, Member, str]]:
    """The members of one sample as they are listed: (name, member, problem)."""
    by_name = {member.name: member for member in members}
    stems = {name: stem for name in by_name for stem, ending in [_split(name)] if ending in pictures}
    plain = {name for name, stem in stems.items() if stem == _sample(name)}
    used = plain or stems.keys()
    captions = set()
    for stem in dict.fromkeys(stems[name] for name in used):
        caption = next((name for name in _caption_names(stem) if name in by_name), None)
        if caption is not None:
            captions.add(caption)
            yield stem + CAPTION, by_name[caption], ""
    for name, member in by_name.items():
        ending = _split(name)[1]
        if ending in PICKLED:
            yield name, member, f"pickled: {ending} can hold code and is never read"
        elif name in stems and name not in used:
            yield name, member, f"beside the picture: {min(plain)} is the picture of this sample"
        elif name not in captions and (name in used or not stems or ending == CAPTION):
            yield name, member, ""


def _caption_names(stem: str) -> Iterator[str]:
    """Where the caption of a picture may stand, the first that is there: under its own name, or that of its sample."""
    for name in dict.fromkeys((stem, _sample(stem))):
        yield from (name + ending for ending in CAPTIONS)


def _sample(name: str) -> str:
    """A member's name up to the first dot of its last part, a leading one aside."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last[:1] + last[1:].partition(".")[0]


def _split(name: str) -> tuple[str, str]:
    stem, ending = posixpath.splitext(name)
    return stem, ending.lower()


def _caption_in(data: bytes, name: str) -> bytes:
    """The caption in a sample's JSON. FileNotFoundError, which leaves the picture out and names the member, where there is none."""
    try:
        caption = json.loads(data)[JSON_FIELD]
    except (ValueError, KeyError, TypeError, RecursionError):
        caption = None
    if not isinstance(caption, str):
        raise FileNotFoundError(f'{name} is no JSON with a text under "{JSON_FIELD}"')
    return caption.encode("utf-8", "surrogatepass")
