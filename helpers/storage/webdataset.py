"""Tars in the layout of the webdataset library: the members of a sample have the same name and different extensions.

The member `dir/0001.jpg` of `shard.tar` appears as the file `shard/dir/0001.jpg`, and its caption as `shard/dir/0001.txt`. Members whose
names are equal up to the first dot form a sample:

- Images are listed. If there is one with a plain extension (`0001.jpg`), those with a longer one (`0001.mask.png`) are left out.
- The caption is the `.txt`, else the `.caption`, else the text of "caption" in the `.json`.
- Pickled members (`.pyd`, `.pickle`, `.pkl`, ...) are left out, and never read.
- Other members (`.cls`, `.npy`, ...) belong to the sample if it has an image, as captions do. Without an image they are listed.
"""

from __future__ import annotations

import io
import itertools
import posixpath
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

from helpers.errors import DataError
from helpers.foreign_json import parse_json
from helpers.storage.backend import Entry, skipped_folder
from helpers.storage.memo import Memo, digest_of, file_state
from helpers.storage.tar import Member, Section, TarIndex, read_index, read_member

PICKLED = frozenset({".pyd", ".pickle", ".pkl", ".pt", ".pth"})
CAPTION = ".txt"  # the extension under which every caption is listed
CAPTIONS = (CAPTION, ".TXT", ".caption", ".json")  # extensions of captions in a tar, in order of preference
JSON_FIELD = "caption"

_INDEX = "tar index 3"  # raise it when `TarIndex.to_bytes` changes
_THREADS = 8  # that read tar headers: on a network file system they mostly wait


class WebDataset:
    """The samples of tars, read-only. A key is the tar's name without .tar, a slash, and the member's name.

    `pictures` are the extensions of images, in lower case. The headers of a tar are read when it is first needed. With a folder `indices`,
    they are stored there, and other processes and later runs read them from it.
    """

    def __init__(self, shards: Sequence[Path], pictures: Collection[str], indices: Path | None = None) -> None:
        self._shards = {shard.stem: _Shard(shard, pictures, indices) for shard in sorted(shards, key=lambda shard: shard.stem)}
        if len(self._shards) != len(shards):
            raise ValueError("two tars have one name")
        self.name = str(shards[0]) if len(shards) == 1 else f"{len(shards):,} tars from {shards[0]} on"

    def list(self) -> Iterator[Entry]:
        """Every image, caption and unrelated member, by tar and name. DataError if a file is missing or is not a tar."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="tars") as pool:
            shards = iter(self._shards.items())
            # A few tars ahead: their indices stay in memory, their lists of members do not.
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
            raise FileNotFoundError(f"there is no tar named {shard}")
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
        """The index from the memo if the tar is unchanged, else from the tar."""
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
            # With the offset, so that a member of the same name in a replaced tar of the same time counts as changed.
            return Entry(f"{shard}/{name}", member.size, modified, f"{index.version.size}:{member.offset}:{index.etag}", problem)

        if index.damage:
            yield Entry(f"{shard}.tar", index.version.size, modified, index.etag, index.damage)
        for _, members in itertools.groupby(index.members, key=lambda member: _sample(member.name)):
            for name, member, problem in _shown(list(members), self._pictures):
                yield entry(name, member, problem)
        for member in index.problems:
            yield entry(member.name, member, member.problem)
        for folder in index.skipped_folders:
            yield skipped_folder(f"{shard}/{folder}")

    def member(self, name: str) -> Member:
        """The member of a listed name. For a .txt it may be the .caption or .json that holds the caption."""
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
    """The members of one sample as they are listed: name, member, reason why it is left out."""
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
            yield name, member, f"pickled: a {ending} file may contain code, and is never read"
        elif name in stems and name not in used:
            yield name, member, f"extra image: {min(plain)} is the image of this sample"
        elif name not in captions and (name in used or not stems or ending == CAPTION):
            yield name, member, ""


def _caption_names(stem: str) -> Iterator[str]:
    """The members that may hold the caption of an image, in order of preference: with its own name, then with that of its sample."""
    for name in dict.fromkeys((stem, _sample(stem))):
        yield from (name + ending for ending in CAPTIONS)


def _sample(name: str) -> str:
    """A member's name up to the first dot of its last part. A leading dot does not count."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last[:1] + last[1:].partition(".")[0]


def _split(name: str) -> tuple[str, str]:
    stem, ending = posixpath.splitext(name)
    return stem, ending.lower()


def _caption_in(data: bytes, name: str) -> bytes:
    """The caption in a sample's JSON. FileNotFoundError if it has none; the image is then left out with this message."""
    try:
        caption = parse_json(data)[JSON_FIELD]
    except (ValueError, KeyError, TypeError):
        caption = None
    if not isinstance(caption, str):
        raise FileNotFoundError(f'{name} has no text for "{JSON_FIELD}"')
    return caption.encode("utf-8", "surrogatepass")
