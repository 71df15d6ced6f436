"""What pixel models have in the place of a VAE."""

from __future__ import annotations

import torch
from torch import Tensor


class Pixels:
    """The `ImageCodec` of models that are trained on pixels: the identity.

    Pixels are multiples of 1/127.5, so a cache in fp16 (2^-12 off at most) still tells all 256 values of a channel apart.
    """

    fingerprint = "pixels"

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] => {"mean": the same}, float32 on the CPU."""
        return {"mean": pixels.to("cpu", torch.float32)}

    def decode(self, latents: Tensor) -> Tensor:
        """pixels (B, 3, H, W) => the same within [-1, 1], float32 on the CPU."""
        return latents.to("cpu", torch.float32).clamp(-1, 1)
