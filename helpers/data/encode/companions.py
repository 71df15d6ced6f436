"""Companions of an image: other images of the same name, from another dataset, that belong to it.

The only role today is "condition": what a ControlNet is given beside each image. A companion is cut exactly as its image is: resized to
the size that the whole image is resized to, then flipped and cropped with it. So it may have another scale than its image but not
another shape, and both show the same place at the same position.

A companion is stored in the record of its image's latents. Both are read together, found or missing together, and encoded again when
either file changes. Where the network reads pixels, the record holds a PNG: exact, and about as large as the original file, while raw
bytes would be many times the size of the latents.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from helpers.config.datasets import DatasetConfig
from helpers.data.base.images import decode
from helpers.data.base.sample import Geometry
from helpers.data.ports import ModelEncoders, reads_conditions

IMAGE, CONDITION = "image", "condition"  # roles
VERSION = 1  # raise this whenever another tensor is made of the same companion and cut


@dataclass(frozen=True)
class Kind:
    """What kind of file an image, or a companion of it, is."""

    role: str  # of a companion, the name of its tensor in the record
    dataset: str  # id of the dataset it is read from
    filter: str = "lanczos"  # how it is resized: lanczos or nearest
    as_latents: bool = True  # whether the network reads VAE latents or pixels

    @property
    def fact(self) -> str:
        """All that a companion's tensor depends on besides the file, the cut and the codec."""
        return f"{'latents' if self.as_latents else 'pixels'} {self.filter} v{VERSION}"

    def blank(self, latents: Tensor, geometry: Geometry) -> Tensor:
        """Zeros in place of a companion of blank latents (C, h, w): the same, or (3, H, W)."""
        return latents if self.as_latents else torch.zeros(3, geometry.target.height, geometry.target.width)


def companions_of(dataset: DatasetConfig, family: ModelEncoders) -> tuple[Kind, ...]:
    """The companions that every image of a dataset has."""
    of = dataset.condition
    if of is None:
        return ()
    return (Kind(CONDITION, of.id, of.resize_filter, reads_conditions(family) and family.condition_as_latents),)


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
