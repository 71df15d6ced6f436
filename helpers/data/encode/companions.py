"""Companions of an image: other images of the same name, from another dataset, that belong to it.

There are two roles. A "condition" is what a ControlNet is given beside each image. A "mask" weights the pixels of the image in the loss;
it may also be the image's own alpha channel. A companion is cropped exactly as its image is: resized to the size that the whole image is
resized to, then flipped and cropped with it. So it may have another scale than its image but not another shape, and both show the same
place at the same position.

A companion is stored in the record of its image's latents. Both are read together, found or missing together, and encoded again when
either file changes. Where the network reads pixels, the record holds a PNG: exact, and about as large as the original file, while raw
bytes would be many times the size of the latents. Of a mask it holds the mean over the pixels that each latent pixel stands for.
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
from helpers.data.base.sample import CONDITION, MASK, Geometry
from helpers.data.ports import ModelEncoders, reads_conditions

IMAGE = "image"  # the role of the image itself
VERSION = 1  # raise this whenever another tensor is made of the same companion and crop


@dataclass(frozen=True)
class Kind:
    """What kind of file an image, or a companion of it, is."""

    role: str  # of a companion, the name of its tensor in the record
    dataset: str  # id of the dataset it is read from
    filter: str = "lanczos"  # how it is resized: lanczos or nearest
    as_latents: bool = True  # whether the network reads VAE latents or pixels
    downsampling: int = 1  # of a mask: the edge of the square of pixels that a latent pixel stands for
    is_alpha: bool = False  # a mask that is the alpha channel of its image

    @property
    def fact(self) -> str:
        """All that a companion's tensor depends on besides the file, the crop and the codec."""
        if self.role == MASK:
            return f"{'alpha' if self.is_alpha else 'brightness'} 1/{self.downsampling} v{VERSION}"
        return f"{'latents' if self.as_latents else 'pixels'} {self.filter} v{VERSION}"

    def blank(self, latents: Tensor, geometry: Geometry) -> Tensor:
        """What a companion of blank latents (C, h, w) is: zeros like them, or (3, H, W); for a mask ones (1, h, w)."""
        if self.role == MASK:
            return torch.ones_like(latents[:1])
        return latents if self.as_latents else torch.zeros(3, geometry.target.height, geometry.target.width)


def companions_of(dataset: DatasetConfig, family: ModelEncoders) -> tuple[Kind, ...]:
    """The companions that every image of a dataset has."""
    kinds = []
    if (of := dataset.condition) is not None:
        kinds.append(Kind(CONDITION, of.id, of.resize_filter, reads_conditions(family) and family.condition_as_latents))
    if (masks := dataset.mask) is not None or dataset.alpha_is_mask:
        named, size = dataset.id if masks is None else masks.id, family.latents.downsampling
        kinds.append(Kind(MASK, named, as_latents=False, downsampling=size, is_alpha=masks is None))
    return tuple(kinds)


def mask_of(image: Image.Image, downsampling: int) -> Tensor:
    """A cropped mask in mode L, (H, W) => weights of latent pixels, float32 (1, H / downsampling, W / downsampling) in [0, 1].

    Each is the mean over the square of pixels that the latent pixel stands for.
    """
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).div_(255)
    return torch.nn.functional.avg_pool2d(pixels[None], downsampling)


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
