"""What a picture is trained to follow: the condition beside each image, a picture of the same name in another data set.

A condition is cut just as its image is: whole, it is resized to the size that the whole image is resized to, then mirrored and cut with
it. So it may have another scale than the image, but not another shape, and what is at a place in the one is at this place in the other.

It is kept in the record of its image's latents and is there, or not, when they are: read once, told with them, encoded anew when either
file changes. Networks that read conditions as pixels have them there as a PNG, which is exact and about as large as the file that it was
made of; as plain bytes they would be many times what the latents are.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from helpers.data.base.images import cut_out, decode, pixels_of, require_size
from helpers.data.base.sample import Geometry, Sample
from helpers.errors import StorageError
from helpers.storage.backend import SourceBackend

NAME = "condition"  # of the tensor in a record
VERSION = 1  # to be raised by whoever changes what a condition is made into
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


@dataclass(frozen=True)
class Conditions:
    """Where the conditions of a data set are and what they become: `filter` is lanczos or nearest."""

    source: SourceBackend
    filter: str
    as_latents: bool  # whether the network reads them as the VAE encodes them, or as pixels

    @property
    def fact(self) -> str:
        """All that the tensor depends on beside the file, the cut and the codec."""
        return f"{'latents' if self.as_latents else 'pixels'} {self.filter} v{VERSION}"


@dataclass
class Condition:
    """One condition on its way into a record."""

    row: int  # in the catalogue
    sample: Sample
    content: str = ""  # SHA-256 in hex, once read
    data: bytes | None = None  # the file, until it is decoded
    made: Tensor | None = None  # (3, H, W) in [-1, 1] for the codec, or what `packed` gives


def read(condition: Condition, source: SourceBackend) -> str:
    """Read the file. => why that cannot be done, or ""; StorageError where the store fails."""
    key = condition.sample.key
    try:
        condition.data = source.read(key)
    except (FileNotFoundError, PermissionError) as error:
        return f"condition cannot be opened: {error.strerror or error}"
    except OSError as error:
        raise StorageError(f"{source.name}: {key} could not be read: {error.strerror or error}") from error
    condition.content = hashlib.sha256(condition.data).hexdigest()
    return ""


def make(condition: Condition, conditions: Conditions, geometry: Geometry) -> None:
    """Decode and cut what was read, as `geometry` cuts the image. ImageError where it cannot be done."""
    data, condition.data = condition.data, None
    assert data is not None
    size, nearest = condition.sample.size, conditions.filter == "nearest"
    require_size(data, size)
    image = decode(data, None if nearest else geometry.resized)
    shown = cut_out(image, size, geometry, FILTERS[conditions.filter])
    condition.made = pixels_of(shown) if conditions.as_latents else packed(shown)


def packed(image: Image.Image) -> Tensor:
    """A picture as the bytes of a PNG with zeros behind them, uint8 (N,)."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=3)
    length = len(encoded.getvalue())
    step = 1 << max(6, length.bit_length() - 5)  # a cache knows every length that occurs: so there are few, each at most a sixteenth longer
    encoded.write(bytes(-length % step))
    return torch.from_numpy(np.frombuffer(encoded.getvalue(), np.uint8).copy())


def unpacked(kept: Tensor) -> Tensor:
    """What a record holds => what the network reads, float32: pixels (3, H, W) in [0, 1], or latents (C, h, w)."""
    if kept.dtype != torch.uint8:
        return kept.float()
    image = decode(kept.numpy().tobytes())
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
