"""The images of a unit on their way from files to records: read, hashed, decoded and cropped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

from helpers.data.base.images import ImageError, cropped, decode, decode_alpha, decode_mask, pixels_of, require_size
from helpers.data.base.sample import MASK, Geometry, Sample
from helpers.data.encode.companions import IMAGE, Kind, mask_of, packed
from helpers.data.encode.keys import crops, latents_key
from helpers.data.encode.store import Unit
from helpers.errors import StorageError
from helpers.storage.backend import SourceBackend

Sources = Mapping[str, SourceBackend]  # by id of the dataset

FILTERS = {"lanczos": Resampling.LANCZOS, "nearest": Resampling.NEAREST}


@dataclass
class ItemFile:
    """The file of an image, or of a companion of it."""

    kind: Kind
    row: int  # in the catalogue
    sample: Sample
    data: bytes = b""  # until it is decoded
    content: str = ""  # SHA-256 in hex, once read
    tensor: Tensor | None = None  # (3, H, W) in [-1, 1] where it is to be encoded, else what `packed` or `mask_of` returns
    part_of: ItemFile | None = None  # the file that holds it, if it is none of its own: that of the image, for a mask in its alpha channel

    def read(self, sources: Sources) -> str:
        """Read the whole file. Returns why that is not possible, or "". Raises StorageError where the store fails."""
        if self.part_of is not None:
            self.data = self.part_of.data
            return ""
        source = sources[self.kind.dataset]
        try:
            self.data = source.read(self.sample.key)
        except (FileNotFoundError, PermissionError) as error:
            return f"{self._name}cannot be opened: {error.strerror or error}"
        except OSError as error:
            raise StorageError(f"{source.name}: {self.sample.key} could not be read: {error.strerror or error}") from error
        self.content = hashlib.sha256(self.data).hexdigest()
        return ""

    def decode(self, geometry: Geometry) -> str:
        """Decode and crop what was read. Returns why that is not possible, or ""."""
        size, resized = self.sample.size, None if self.kind.filter == "nearest" else geometry.resized
        try:
            # Before decoding: a JPEG may be decoded at half its size, which then looks like that of an image half as large.
            require_size(self.data, size)
            if self.kind.role == MASK:
                self.tensor = self._mask(geometry)
            else:
                image = cropped(decode(self.data, resized), size, geometry, FILTERS[self.kind.filter])
                self.tensor = pixels_of(image) if self.kind.as_latents else packed(image)
        except ImageError as error:
            return f"{self._name}{error}"
        self.data = b""
        return ""

    def _mask(self, geometry: Geometry) -> Tensor:
        """What `mask_of` returns. Resized by areas, so that black stays 0 next to an edge, where a smoother filter would overshoot."""
        mask = decode_alpha(self.data) if self.kind.is_alpha else decode_mask(self.data)
        if mask is None:  # an image without an alpha channel is opaque
            mask = Image.new("L", self.sample.size, 255)
        return mask_of(cropped(mask, self.sample.size, geometry, Resampling.BOX), self.kind.downsampling)

    @property
    def _name(self) -> str:
        return "" if self.kind.role == IMAGE or self.part_of is not None else f"{self.kind.role} "


@dataclass
class EncodeItem:
    """One image of a unit with its companions. Each stage fills in what the next one needs."""

    planned: int  # row in the plan
    geometry: Geometry
    crop: str  # what of the geometry is part of the key
    files: list[ItemFile]  # the image itself, then its companions
    facts: dict[str, str] = field(default_factory=dict)
    key: bytes = b""
    is_missing: bool = False  # from the cache
    is_ready: bool = False  # to be encoded: every file has its tensor
    record: dict[str, Tensor] | None = None
    problem: str = ""  # why it has no record, in words for the user
    is_undecodable: bool = False  # so no other machine could encode it either

    @property
    def image(self) -> ItemFile:
        return self.files[0]

    @property
    def contents(self) -> list[tuple[int, str]]:
        """(catalogue row, content) of each file that was read."""
        return [(file.row, file.content) for file in self.files if file.content]

    def read(self, sources: Sources) -> None:
        problems = [file.read(sources) for file in self.files]
        self.problem = next(filter(None, problems), "")

    def decode(self) -> None:
        self.problem = next(filter(None, (file.decode(self.geometry) for file in self.files)), "")
        self.is_undecodable = bool(self.problem)
        if not self.problem and any(file.kind.role == MASK and file.tensor is not None and not file.tensor.any() for file in self.files):
            geometry = self.geometry
            self.problem = f"mask outside the crop: {geometry.target} at {geometry.left}, {geometry.top} shows nothing of its white"
        self.is_ready = not self.problem

    def free(self) -> None:
        """Let go of file contents and pixels."""
        self.is_ready = False
        for file in self.files:
            file.data, file.tensor = b"", None


def load(unit: Unit, sources: Sources) -> list[EncodeItem]:
    """The images of a unit, read, and where one of them is not cached, decoded and cropped."""
    items = [_item(unit, int(row), crop) for row, crop in zip(unit.rows, crops(unit.latents.plan, unit.rows), strict=True)]
    for item in items:
        item.read(sources)
        if not item.problem:
            contents = " ".join(content for _, content in item.contents)
            item.facts = unit.latents.facts(unit.dataset, contents, item.crop)
            item.key = latents_key(item.facts)
    readable = [item for item in items if not item.problem]
    for item, location in zip(readable, unit.cache.find(item.key for item in readable), strict=True):
        item.is_missing = not location["shard"]
    if any(item.is_missing for item in readable):
        for item in readable:
            item.decode()
    if not any(item.is_missing and item.is_ready for item in items):
        for item in items:
            item.free()
    return items


def _item(unit: Unit, planned: int, crop: str) -> EncodeItem:
    latents, data = unit.latents, unit.latents.data
    row = int(latents.plan.columns["row"][planned])
    image = ItemFile(Kind(IMAGE, data.datasets[unit.dataset].id), row, data.catalogue.sample(row))
    files = [image]
    for kind in data.companions[unit.dataset]:
        if kind.is_alpha:
            files.append(ItemFile(kind, row, image.sample, part_of=image))
            continue
        companion = data.catalogue.companion_row(row, kind.role)
        assert companion is not None, "the scan leaves out images without a companion"
        files.append(ItemFile(kind, companion, data.catalogue.sample(companion)))
    return EncodeItem(planned, latents.plan.geometry(planned), crop, files)
