"""The images of a unit on their way from files to records: read, hashed, decoded and cut."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from helpers.data.base.images import ImageError, cut, decode, require_size
from helpers.data.base.sample import Geometry, Sample
from helpers.data.encode.companions import Companion
from helpers.data.encode.keys import cuts, latents_key
from helpers.data.encode.store import Unit
from helpers.errors import StorageError
from helpers.storage.backend import SourceBackend


@dataclass
class EncodeItem:
    """One image of a unit. Each stage fills in what the next one needs; `problem` says why it has no record, in words for the user."""

    planned: int  # row in the plan
    row: int  # in the catalogue
    sample: Sample
    geometry: Geometry
    cut: str  # what of the geometry is part of the key
    companions: list[Companion] = field(default_factory=list)
    content: str = ""  # SHA-256 of the file in hex, once read
    facts: dict[str, str] = field(default_factory=dict)
    key: bytes = b""
    is_missing: bool = False  # from the cache
    pixels: Tensor | None = None  # (3, H, W) in [-1, 1]; None where nothing of its unit is to be encoded, and where there is a problem
    record: dict[str, Tensor] | None = None
    problem: str = ""
    is_undecodable: bool = False  # so no other machine could encode it either

    def read(self, sources: Mapping[str, SourceBackend]) -> bytes:
        """The file; reads the companions too. Without content, or with a problem, where one cannot be read. StorageError of a store."""
        for companion in self.companions:
            self.problem = self.problem or companion.read(sources[companion.kind.dataset])
        source = sources[self.sample.dataset]
        try:
            data = source.read(self.sample.key)
        except (FileNotFoundError, PermissionError) as error:
            self.problem = f"cannot be opened: {error.strerror or error}"
            return b""
        except OSError as error:
            raise StorageError(f"{source.name}: {self.sample.key} could not be read: {error.strerror or error}") from error
        self.content = hashlib.sha256(data).hexdigest()
        return data

    @property
    def contents(self) -> list[tuple[int, str]]:
        """(catalogue row, content) of each file that was read: the image's, then its companions'."""
        files = [(self.row, self.content), *((companion.row, companion.content) for companion in self.companions)]
        return [(row, content) for row, content in files if content]

    def decode(self, data: bytes) -> None:
        """Decode and cut the image and its companions."""
        try:
            # Before decoding: a JPEG may be decoded at half its size, which then looks like that of an image half as large.
            require_size(data, self.geometry.original)
            self.pixels = cut(decode(data, self.geometry.resized), self.geometry)
        except ImageError as error:
            self._fail(str(error))
            return
        for companion in self.companions:
            try:
                companion.decode(self.geometry)
            except ImageError as error:
                self._fail(f"{companion.kind.role} {error}")
                return

    def _fail(self, problem: str) -> None:
        self.problem, self.is_undecodable, self.pixels = problem, True, None

    def free(self) -> None:
        """Let go of pixels and file contents."""
        self.pixels = None
        for companion in self.companions:
            companion.data = companion.tensor = None


def load(unit: Unit, sources: Mapping[str, SourceBackend]) -> list[EncodeItem]:
    """The images of a unit, read from `sources` (by id of the dataset), and where one of them is not cached, decoded and cut."""
    items = [_item(unit, int(row), of_row) for row, of_row in zip(unit.rows, cuts(unit.latents.plan, unit.rows), strict=True)]
    files: dict[int, bytes] = {}
    for item in items:
        data = item.read(sources)
        if not item.problem:
            item.facts = unit.latents.facts(unit.dataset, " ".join(content for _, content in item.contents), item.cut)
            item.key = latents_key(item.facts)
            files[item.planned] = data
    readable = [item for item in items if not item.problem]
    for item, location in zip(readable, unit.cache.find(item.key for item in readable), strict=True):
        item.is_missing = not location["shard"]
    if any(item.is_missing for item in readable):
        for item in readable:
            item.decode(files.pop(item.planned))
    if not any(item.is_missing and item.pixels is not None for item in items):
        for item in items:
            item.free()
    return items


def _item(unit: Unit, planned: int, of_row: str) -> EncodeItem:
    latents, catalogue = unit.latents, unit.latents.data.catalogue
    row = int(latents.plan.columns["row"][planned])
    companions = [
        Companion(kind, paired, catalogue.sample(paired))
        for kind in latents.data.companions[unit.dataset]
        if (paired := catalogue.condition_row(row)) is not None
    ]
    return EncodeItem(planned, row, catalogue.sample(row), latents.plan.geometry(planned), of_row, companions)
