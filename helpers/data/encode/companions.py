"""Companions of an image: other images of the same name, from another dataset, that belong to it.

The only role today is "condition": what a ControlNet is given beside each image. A companion is cut exactly as its image is: resized to
the size that the whole image is resized to, then flipped and cropped with it. So it may have another scale than its image but not
another shape, and both show the same place at the same position.

A companion is stored in the record of its image's latents. Both are read together, found or missing together, and encoded again when
either file changes. Where the network reads pixels, the record holds a PNG: exact, and about as large as the original file, while raw
bytes would be many times the size of the latents.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from helpers.config.datasets import DatasetConfig
from helpers.data.base.images import cut_out, decode, pixels_of, require_size
from helpers.data.base.sample import Geometry, Sample
from helpers.data.ports import ModelEncoders, reads_conditions
from helpers.errors import StorageError
from helpers.storage.backend import SourceBackend

CONDITION = "condition"  # a role
VERSION = 1  # raise this whenever the tensor made of the same file and cut changes
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


@dataclass(frozen=True)
class CompanionKind:
    """A companion that every image of a dataset has."""

    role: str  # name of its tensor in the record, and of its fact
    dataset: str  # id of the dataset it is read from
    filter: str  # how it is resized: lanczos or nearest
    as_latents: bool  # whether the network reads VAE latents or pixels

    @property
    def fact(self) -> str:
        """All that its tensor depends on besides the file, the cut and the codec."""
        return f"{'latents' if self.as_latents else 'pixels'} {self.filter} v{VERSION}"

    def blank(self, latents: Tensor, geometry: Geometry) -> Tensor:
        """Zeros of the shape that it has beside latents (C, h, w): the same, or (3, H, W)."""
        return latents if self.as_latents else torch.zeros(3, geometry.target.height, geometry.target.width)


@dataclass
class Companion:
    """One companion of one image, until it is in a record."""

    kind: CompanionKind
    row: int  # in the catalogue
    sample: Sample
    content: str = ""  # SHA-256 in hex, once read
    data: bytes | None = None  # the file, until it is decoded
    tensor: Tensor | None = None  # (3, H, W) in [-1, 1] where it is to be encoded, else what `packed` returns

    def read(self, source: SourceBackend) -> str:
        """Read the file. Returns the reason why that is not possible, or "". Raises StorageError where the store fails."""
        try:
            self.data = source.read(self.sample.key)
        except (FileNotFoundError, PermissionError) as error:
            return f"{self.kind.role} cannot be opened: {error.strerror or error}"
        except OSError as error:
            raise StorageError(f"{source.name}: {self.sample.key} could not be read: {error.strerror or error}") from error
        self.content = hashlib.sha256(self.data).hexdigest()
        return ""

    def decode(self, geometry: Geometry) -> None:
        """Decode the file that was read and cut it as `geometry` cuts the image. Raises ImageError."""
        data, self.data = self.data, None
        assert data is not None
        size, nearest = self.sample.size, self.kind.filter == "nearest"
        require_size(data, size)
        image = cut_out(decode(data, None if nearest else geometry.resized), size, geometry, FILTERS[self.kind.filter])
        self.tensor = pixels_of(image) if self.kind.as_latents else packed(image)


def companions_of(dataset: DatasetConfig, family: ModelEncoders) -> tuple[CompanionKind, ...]:
    """What the images of a dataset have beside them."""
    of = dataset.condition
    if of is None:
        return ()
    return (CompanionKind(CONDITION, of.id, of.resize_filter, reads_conditions(family) and family.condition_as_latents),)


def facts_of(companions: Sequence[CompanionKind]) -> Mapping[str, str]:
    """What the companions add to the facts of a record."""
    return {companion.role: companion.fact for companion in companions}


def packed(image: Image.Image) -> Tensor:
    """The bytes of an image as PNG, padded with zeros, uint8 (N,)."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=3)
    length = len(encoded.getvalue())
    # A cache stores each length that occurs once, so few lengths are used: at most a sixteenth longer than the PNG.
    step = 1 << max(6, length.bit_length() - 5)
    encoded.write(bytes(-length % step))
    return torch.from_numpy(np.frombuffer(encoded.getvalue(), np.uint8).copy())


def unpacked(stored: Tensor) -> Tensor:
    """A companion in a record => what the network reads, float32: pixels (3, H, W) in [0, 1], or latents (C, h, w)."""
    if stored.dtype != torch.uint8:
        return stored.float()
    image = decode(stored.numpy().tobytes())
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
